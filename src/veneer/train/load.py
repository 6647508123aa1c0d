"""Models and tokenizers by name: a local folder or a hub id."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer.errors import RunError
from veneer.train.folders import refuse_adapter, refuse_run_folder
from veneer.train.packages import require
from veneer.train.quantisation import Quantization, not_rounded, quantization_config, refuse_quantised, refuse_unusable

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "stored"]


def load_tokenizer(name: str, *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, with a padding token: its own, or else the token that ends a text."""
    require("train")
    from transformers import AutoTokenizer

    refuse_run_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _not_loaded("tokenizer", name, error) from error
    if tokenizer.eos_token_id is None:
        raise RunError(f"The tokenizer of {name} has no end-of-text token, so nothing would teach the model to stop.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, *, revision: str | None = None, dtype: Dtype = "auto", quantization: Quantization | None = None
) -> "PreTrainedModel":
    """The causal language model, in evaluation mode: on the CPU, or quantised where it will run.

    Raises RunError, and MissingPackageError where the quantisation needs a package.
    """
    require("train")
    refuse_unusable(quantization)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    refuse_run_folder(name)
    refuse_adapter(name)  # transformers would load it together with its base, through peft
    options: dict[str, Any] = {"revision": revision, "dtype": torch_dtype(dtype)}
    if quantization is not None:
        refuse_quantised(name, _config(name, revision), quantization)
        options["quantization_config"] = quantization_config(quantization, options["dtype"])
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options, output_loading_info=True)
    except SafetensorError as error:
        raise RunError(f"The weights of {name} are damaged or cut off: {error}. Get them again.") from error
    except (RuntimeError, MemoryError) as error:
        from veneer.train.out_of_memory import is_out_of_memory, model_too_large

        if is_out_of_memory(error):
            raise model_too_large(name, error) from error
        if quantization is not None:
            raise RunError(not_rounded(name, quantization, error)) from error
        raise RunError(f"The weights of {name} do not fit its config.json{_reason(error)}") from error
    except (OSError, ValueError) as error:
        raise _not_loaded("model", name, error) from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise RunError(
            f"The weights of {name} lack {len(missing)} tensors its config.json asks for, first {missing[0]}. "
            "They would be random numbers."
        )
    return model


def skeleton(name: str, *, revision: str | None = None) -> "nn.Module":
    """The model without weights, on the meta device: needs nothing but its config.json."""
    require("train")
    import torch
    import transformers

    refuse_run_folder(name)
    refuse_adapter(name)
    config = _config(name, revision)
    own = [getattr(transformers, written, None) for written in config.architectures or []]
    with torch.device("meta"):
        if own and own[0] is not None:
            return own[0](config)
        return transformers.AutoModel.from_config(config)


def _config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _not_loaded("configuration", name, error) from error


def torch_dtype(dtype: Dtype) -> "torch.dtype | str":
    """What transformers is told: "auto" is bfloat16 where the accelerator computes in it, else float32; "stored" is
    the dtype of the model's files.
    """
    import torch

    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    table = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if fast else torch.float32,
        "stored": "auto",
    }
    return table[dtype]


def positions(model: Any) -> int | None:
    """How many tokens a model can read at once; None where its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def device() -> "torch.device":
    """Where to run a model: the accelerator if there is one."""
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _not_loaded(what: str, name: str, error: Exception) -> RunError:
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        return RunError(f"There is no model folder {name}.")
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    advice = ""
    if not Path(name).is_dir():
        advice = (
            f"\n  There is no folder {name} here, so it was looked for on the Hugging Face hub. "
            "Without a connection, name a folder that holds the model."
        )
    return RunError(f"The {what} of {name} could not be loaded: {reason}{advice}")


def _reason(error: Exception) -> str:
    """The first line of an error, unless it names only an option of transformers (the tensors are in its log)."""
    line = str(error).partition("\n")[0].rstrip(":")
    return "." if "ignore_mismatched_sizes" in line else f": {line}"

"""Models and tokenizers by name: a local folder or a hub id."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer.errors import RunError
from veneer.train.packages import require

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "stored"]


def load_tokenizer(name: str, *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, with a padding token: its own, or else the token that ends a text."""
    require("train")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _not_loaded("tokenizer", name, error) from error
    if tokenizer.eos_token_id is None:
        raise RunError(f"The tokenizer of {name} has no end-of-text token, so nothing would teach the model to stop.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, *, revision: str | None = None, dtype: Dtype = "auto") -> "PreTrainedModel":
    """The causal language model, on the CPU, in evaluation mode."""
    require("train")
    from transformers import AutoModelForCausalLM

    if Path(name, "adapter_config.json").is_file():  # transformers would load it together with its base, through peft
        raise RunError(f"{name} holds an adapter, not a model. Name the model it belongs to.")
    try:
        return AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch_dtype(dtype))
    except (OSError, ValueError) as error:
        raise _not_loaded("model", name, error) from error


def skeleton(name: str, *, revision: str | None = None) -> "nn.Module":
    """The model without weights, on the meta device: needs nothing but its config.json."""
    require("train")
    import torch
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _not_loaded("configuration", name, error) from error
    own = [getattr(transformers, written, None) for written in config.architectures or []]
    with torch.device("meta"):
        if own and own[0] is not None:
            return own[0](config)
        return transformers.AutoModel.from_config(config)


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
    return RunError(f"The {what} of {name} could not be loaded: {reason}")

"""Which of a layer's inputs EVA looks at. Names and arguments of the exchangeable functions are PEFT's.

Shapes: B batch, T tokens, I in, N rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.config import EvaConfig, LoraConfig
from veneer.errors import ConfigError

# (layer inputs, what prepare_model_inputs_fn answered, layer name) -> rows of shape (N, I)
PrepareLayer = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call the model with a batch that is a mapping of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: LoraConfig) -> Tensor:
    """The positions (N, 2) in the batch of the tokens that count: attended to and, unless told otherwise, with a label.

    Raises ConfigError if the batch is not that of a language model.
    """
    if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
        raise ConfigError(
            "EVA looks for input_ids in each batch, and this is not a mapping with them: give prepare_model_inputs_fn "
            "and prepare_layer_inputs_fn for your own batches, or None for both to look at all inputs."
        )
    mask = torch.ones_like(model_input["input_ids"], dtype=torch.bool)
    if (attended := model_input.get("attention_mask")) is not None:
        if attended.shape != mask.shape:
            raise ConfigError(
                f"EVA cannot read an attention_mask of shape {list(attended.shape)} over input_ids of shape "
                f"{list(mask.shape)}: give a prepare_model_inputs_fn of your own."
            )
        mask = attended.bool()
    settings = EvaConfig.of(peft_config.eva_config)
    labels = model_input.get("labels")
    if settings.use_label_mask and labels is not None:
        if labels.shape != mask.shape:
            raise ConfigError(
                f"EVA's label mask needs a label for each token, and labels have shape {list(labels.shape)}, input_ids "
                f"{list(mask.shape)}: set EvaConfig(use_label_mask=False)."
            )
        mask = mask & (labels != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows (N, I) of a layer's input (B, T, I) at the given positions. Raises ConfigError for other shapes."""
    x = _tensor(layer_input, layer_name)
    index = model_input.to(x.device)
    if x.dim() != 3 or (len(index) and not (index.amax(0) < torch.tensor(x.shape[:2], device=x.device)).all()):
        raise ConfigError(
            f"{layer_name}: its input has shape {list(x.shape)}, not (batch, tokens, features) as the batch has, so "
            f"the tokens that count cannot be told. Give prepare_layer_inputs_fn={{{layer_name!r}: …}} for it, or "
            "leave the layer out."
        )
    return x[index.T.unbind()]


def all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Every row (N, I) of a layer's input."""
    x = _tensor(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _tensor(layer_input: Any, layer_name: str) -> Tensor:
    x = layer_input[0] if isinstance(layer_input, tuple | list) and layer_input else layer_input
    if not isinstance(x, Tensor):
        raise ConfigError(
            f"{layer_name}: its input is a {type(x).__name__}, not a tensor: give a prepare_layer_inputs_fn for it."
        )
    return x


def by_layer(chosen: PrepareLayer | Mapping[str, PrepareLayer] | None, names: list[str]) -> dict[str, PrepareLayer]:
    """The function for each layer. A mapping need not name all: the others' rows all count.

    Raises ConfigError for a name that is no layer's.
    """
    if not isinstance(chosen, Mapping):
        return dict.fromkeys(names, chosen or all_rows)
    if unknown := [name for name in chosen if name not in names]:
        raise ConfigError(
            f"prepare_layer_inputs_fn names {', '.join(map(str, unknown[:3]))}, which EVA does not look at; it "
            f"looks at {', '.join(names[:3])}, …"
        )
    return {name: chosen.get(name) or all_rows for name in names}


def gathered(X_NI: Tensor) -> Tensor:
    """The rows of all processes, in their order, in each of them. Every process must come here equally often."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=X_NI.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(X_NI)], device=X_NI.device))
    most = max(int(size) for size in sizes)
    padded = X_NI.new_zeros(most, X_NI.shape[1])
    padded[: len(X_NI)] = X_NI
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def on_device(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on the device; as it is if None."""
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(on_device(value, device) for value in batch)
    return batch


def only_device(model: nn.Module) -> torch.device | None:
    """The device of the model, None if it is on several: then its own hooks move the inputs."""
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    return devices.pop() if len(devices) == 1 else None

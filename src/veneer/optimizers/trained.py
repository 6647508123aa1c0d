"""What trains in an adapted model, and as what: the factors of its adapters, and everything beside them."""

import math
from numbers import Real
from typing import Any

from torch import nn

from veneer.errors import AdapterNameError, ConfigError, bullet_list, check_kind
from veneer.layers.adapter import Adapter


def adapters_in_training(model: nn.Module) -> dict[str, Adapter]:
    """The adapters with a factor that gets gradients, by path, each once. AdapterNameError if there is none."""
    check_kind(model, nn.Module, "A model (a torch.nn.Module)")
    adapters = {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}
    if not adapters:
        raise AdapterNameError("The model has no adapter to optimize. Lay one over it first: get_peft_model.")
    training = {
        path: adapter
        for path, adapter in adapters.items()
        if adapter.lora_A.requires_grad or adapter.lora_B.requires_grad
    }
    if not training:
        names = ", ".join(sorted({repr(name_of(path)) for path in adapters}))
        raise AdapterNameError(
            f"No adapter of the model trains ({names}): it was loaded for use, or is not active. "
            "Load it with is_trainable=True, or call set_adapter or set_requires_grad(name, True)."
        )
    first: dict[int, str] = {}
    for path, adapter in training.items():
        first.setdefault(id(adapter.lora_B), path)
    return {path: training[path] for path in first.values()}


def name_of(path: str) -> str:
    """The name of the adapter that a module at this path belongs to.

    >>> name_of("model.layers.0.self_attn.q_proj.adapters.default")
    'default'
    """
    return path.rpartition("adapters.")[2].partition(".")[0]


def without_decay(model: nn.Module) -> set[int]:
    """The ids of the parameters that weight decay is not meant for: biases, and the weights of norms."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" in name or "norm" in type(module).__name__.lower()
    }


def check_numbers(from_zero: dict[str, Any], *, above_zero: dict[str, Any] | None = None) -> None:
    """ConfigError that lists each argument that is no finite number of at least 0, or above 0."""
    above_zero = above_zero or {}
    problems = [
        f"{name} should be a finite number {'above' if name in above_zero else 'of at least'} 0, got {value!r}"
        for name, value in (from_zero | above_zero).items()
        if not _is_finite(value) or value < 0 or (name in above_zero and value == 0)
    ]
    if problems:
        raise ConfigError(bullet_list("The optimizer cannot be made.", problems))


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

"""Where a layer's weight is kept and how it is read and written; `STORES` is the table."""

import torch
from torch import Tensor

from veneer.errors import MergeError
from veneer.layers.kinds import Layer
from veneer.layers.weights.dense import DENSE
from veneer.layers.weights.store import Store

STORES: tuple[Store, ...] = (DENSE,)


def store_of(layer: Layer, parameter: str = "weight") -> Store:
    """The store that knows this weight of the layer. Raises MergeError if none does."""
    for store in STORES:
        if store.holds(layer, parameter):
            return store
    raise MergeError(
        f"The weight of a {type(layer).__name__} is not a plain tensor of floating-point numbers (it is quantised, or "
        "computed from others), so it cannot be read or merged yet. Plain LoRA over it works; for DoRA or a merge load "
        "the base in float32, bfloat16 or float16."
    )


def is_offloaded(layer: Layer, parameter: str = "weight") -> bool:
    """Whether accelerate keeps the weight elsewhere and brings it in for each call."""
    return "_hf_hook" in vars(layer) and stored(layer, parameter).is_meta


def home(layer: Layer, parameter: str = "weight") -> torch.device:
    """The device on which the layer computes: where its adapters belong."""
    if is_offloaded(layer, parameter):
        return torch.device(layer._hf_hook.execution_device)
    return stored(layer, parameter).device


def stored(layer: Layer, parameter: str = "weight") -> Tensor:
    """The weight as the layer keeps it, quantised or not, without any adapter."""
    registered = layer._parameters.get(parameter)
    return getattr(layer, parameter) if registered is None else registered


def read(layer: Layer, parameter: str = "weight") -> Tensor:
    """A weight of the layer as a floating-point tensor, as the layer itself uses it."""
    return store_of(layer, parameter).read(layer, parameter)


__all__ = ["STORES", "Store", "home", "is_offloaded", "read", "store_of", "stored"]

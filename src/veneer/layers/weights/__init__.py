"""Where a layer's weight is kept and how it is read and written; `STORES` is the table."""

import torch
from torch import Tensor

from veneer.errors import MergeError
from veneer.layers.kinds import Layer
from veneer.layers.weights.dense import DENSE
from veneer.layers.weights.store import Store

STORES: tuple[Store, ...] = (DENSE,)


def store_of(layer: Layer) -> Store:
    """The store that knows this layer's weight. Raises MergeError if none does."""
    for store in STORES:
        if store.holds(layer):
            return store
    raise MergeError(
        f"The weight of a {type(layer).__name__} is not a plain tensor of floating-point numbers (it is quantised, or "
        "computed from others), so it cannot be read or merged yet. Plain LoRA over it works; for DoRA or a merge load "
        "the base in float32, bfloat16 or float16."
    )


def is_offloaded(layer: Layer) -> bool:
    """Whether accelerate keeps the weight elsewhere and brings it in for each call."""
    return "_hf_hook" in vars(layer) and layer.weight.is_meta


def home(layer: Layer) -> torch.device:
    """The device on which the layer computes: where its adapters belong."""
    if is_offloaded(layer):
        return torch.device(layer._hf_hook.execution_device)
    return layer.weight.device


def read(layer: Layer) -> Tensor:
    """The layer's weight as a floating-point tensor, as the layer itself uses it."""
    return store_of(layer).read(layer)


__all__ = ["STORES", "Store", "home", "is_offloaded", "read", "store_of"]

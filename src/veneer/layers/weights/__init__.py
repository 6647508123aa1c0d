"""Where a layer's weight is kept and how it is read and written; `STORES` is the table."""

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
        f"The weight of a {type(layer).__name__} is stored as {layer.weight.dtype}, which cannot be read or merged "
        "yet. Plain LoRA over it works; for DoRA or a merge load the base in float32, bfloat16 or float16."
    )


def read(layer: Layer) -> Tensor:
    """The layer's weight as a floating-point tensor, as the layer itself uses it."""
    return store_of(layer).read(layer)


__all__ = ["STORES", "Store", "read", "store_of"]

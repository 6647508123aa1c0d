"""The shape of a table entry: how one way of storing a weight is read and written."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from veneer.layers.kinds import Layer


@dataclass(frozen=True)
class Store:
    """One way of keeping a weight.

    holds  (layer) -> whether this store knows the layer's weight
    read   (layer) -> the weight in floating point
    write  (layer, W) puts a new weight in place as a parameter of its own, so that a tied one elsewhere stays
    """

    name: str
    holds: Callable[[Layer], bool]
    read: Callable[[Layer], Tensor]
    write: Callable[[Layer, Tensor], None]

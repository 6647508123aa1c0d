"""The shape of a table entry: how one way of storing a weight is read and written."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from veneer.layers.kinds import Layer


@dataclass(frozen=True)
class Store:
    """One way of keeping a weight.

    `parameter` is the weight's name on the layer.

    holds  (layer, parameter) -> whether this store knows the weight
    read   (layer, parameter) -> the weight in floating point
    write  (layer, parameter, W) puts W in place as a parameter of its own, so that a tied one elsewhere stays; None if
           the store only reads
    """

    name: str
    holds: Callable[[Layer, str], bool]
    read: Callable[[Layer, str], Tensor]
    write: Callable[[Layer, str, Tensor], None] | None

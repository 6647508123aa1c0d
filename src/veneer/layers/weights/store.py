"""The shape of a table entry: how one way of storing a weight is read and written; and what several entries share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.layers.kinds import Layer


@dataclass(frozen=True)
class Store:
    """One way of keeping a weight.

    `parameter` is the weight's name on the layer.

    holds     (layer, parameter) -> whether this store knows the weight
    read      (layer, parameter) -> the weight in floating point
    write     (layer, parameter, W) puts W in place as a parameter of its own, so that a tied one elsewhere stays; where
              the store is quantised, W is what `quantise` gave, or what the layer had before. None if the store only
              reads
    quantise  (layer, parameter, W) -> W rounded to the form in which the layer keeps its weight, as a parameter that
              carries all it takes to read it; changes nothing
    value     (such a parameter) -> what it stands for, in floating point
    is_quantised  whether the weight is kept in few bits, so that what is written would be rounded
    """

    name: str
    holds: Callable[[Layer, str], bool]
    read: Callable[[Layer, str], Tensor]
    write: Callable[[Layer, str, Tensor], None] | None
    quantise: Callable[[Layer, str, Tensor], nn.Parameter] | None = None
    value: Callable[[Tensor], Tensor] | None = None
    is_quantised: bool = False


def value(weight: Any) -> Tensor:
    """What a weight that is a tensor class of its library's stands for, in the dtype that it had before."""
    with torch.no_grad():
        return weight.dequantize()


def read(layer: Layer, parameter: str) -> Tensor:
    """The same of a layer's weight."""
    return value(layer._parameters[parameter])


def write(layer: Layer, parameter: str, weight: Tensor) -> None:
    """Put a parameter that carries all it takes to read it in the place of another."""
    layer._parameters[parameter] = weight

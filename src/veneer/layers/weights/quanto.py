"""Weights that optimum-quanto keeps in few bits, once its layers are frozen."""

import torch
from torch import Tensor, nn

from veneer.layers.kinds import Layer
from veneer.layers.weights.store import Store, read, value, write


def _is_quanto(cls: type, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith("optimum.quanto.") for c in cls.__mro__)


def _holds(layer: Layer, parameter: str) -> bool:
    weight = layer._parameters.get(parameter)
    kept_so = _is_quanto(type(weight), "QTensor") and _is_quanto(type(layer), "QModuleMixin")
    return kept_so and parameter == "weight" and not weight.is_meta


def _quantise(layer: Layer, parameter: str, W: Tensor) -> nn.Parameter:
    """What the layer makes of W when it is frozen: with its own number format and its own choice of scales."""
    kept = layer._parameters[parameter]
    layer._parameters[parameter] = nn.Parameter(W.detach(), requires_grad=False)
    try:
        with torch.no_grad():
            return nn.Parameter(layer.qweight, requires_grad=False)
    finally:
        layer._parameters[parameter] = kept


QUANTO = Store("quanto", _holds, read, write, _quantise, value, is_quantised=True)

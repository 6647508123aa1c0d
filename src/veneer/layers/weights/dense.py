"""Weights that are just floating-point tensors."""

import torch
from torch import Tensor, nn

from veneer.layers.kinds import Layer
from veneer.layers.weights.store import Store

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _holds(layer: Layer, parameter: str) -> bool:
    weight = layer._parameters.get(parameter)  # not there if it is computed, as under weight norm
    return type(weight) is nn.Parameter and weight.dtype in DTYPES


def _read(layer: Layer, parameter: str) -> Tensor:
    return layer._parameters[parameter]


def _write(layer: Layer, parameter: str, W: Tensor) -> None:
    layer._parameters[parameter] = nn.Parameter(W, requires_grad=False)


DENSE = Store("dense", _holds, _read, _write)

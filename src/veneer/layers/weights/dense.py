"""Weights that are just floating-point tensors."""

import torch
from torch import Tensor, nn

from veneer.layers.kinds import Layer
from veneer.layers.sharded import is_away, whole
from veneer.layers.weights.store import Store

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stored_as_parameter(layer: Layer, parameter: str) -> Tensor | None:
    """A registered parameter's value; None if there is none of this name, as where it is computed by weight norm.

    Within the forward of a FullyShardedDataParallel that is a view of the gathered weights, no `nn.Parameter`.
    """
    weight = layer._parameters.get(parameter)
    if weight is not None:
        return weight
    gathered = vars(layer).get(parameter)  # there alone while a forward is computed again in a backward
    flat = gathered._base if isinstance(gathered, Tensor) else None
    return gathered if getattr(flat, "_is_flat_param", False) else None


def _holds(layer: Layer, parameter: str) -> bool:
    weight = stored_as_parameter(layer, parameter)
    return weight is not None and type(weight) in (nn.Parameter, Tensor) and weight.dtype in DTYPES


def _read(layer: Layer, parameter: str) -> Tensor:
    weight = stored_as_parameter(layer, parameter)
    assert weight is not None
    return whole(weight) if is_away(weight) else weight


def _write(layer: Layer, parameter: str, W: Tensor) -> None:
    layer._parameters[parameter] = nn.Parameter(W, requires_grad=False)


DENSE = Store("dense", _holds, _read, _write)

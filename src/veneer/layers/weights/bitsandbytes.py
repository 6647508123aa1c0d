"""Weights that bitsandbytes keeps in 8 or 4 bits. They are read, never written: rounding again would lose an update.

Shapes: I in, O out.
"""

import torch
from torch import Tensor

from veneer.layers.kinds import Layer
from veneer.layers.weights.store import Store

_LARGEST = 127  # what the largest number of each row was rounded to


def _is(layer: Layer, parameter: str, name: str) -> bool:
    kind = type(layer._parameters.get(parameter))
    return kind.__name__ == name and kind.__module__.startswith("bitsandbytes.")


def _holds_8bit(layer: Layer, parameter: str) -> bool:
    weight = layer._parameters.get(parameter)
    return _is(layer, parameter, "Int8Params") and weight.dtype == torch.int8 and not weight.is_meta


def _read_8bit(layer: Layer, parameter: str) -> Tensor:
    """The (O, I) weight in float32. bitsandbytes keeps a row's largest number with the weight until the first call."""
    weight = layer._parameters[parameter]
    largest_O = weight.SCB if weight.SCB is not None else layer.state.SCB
    return weight.detach().float() * (largest_O.to(weight.device, torch.float32) / _LARGEST).unsqueeze(1)


def _holds_4bit(layer: Layer, parameter: str) -> bool:
    weight = layer._parameters.get(parameter)
    return _is(layer, parameter, "Params4bit") and weight.quant_state is not None and not weight.is_meta


def _read_4bit(layer: Layer, parameter: str) -> Tensor:
    """The (O, I) weight in the dtype that it had before."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer._parameters[parameter]
    return dequantize_4bit(weight.data, weight.quant_state)


BITSANDBYTES_8BIT = Store("bnb 8bit", _holds_8bit, _read_8bit, None)
BITSANDBYTES_4BIT = Store("bnb 4bit", _holds_4bit, _read_4bit, None)

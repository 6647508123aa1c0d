"""Weights that bitsandbytes keeps in 8 or 4 bits. They are read, never written: rounding again would lose an update.

Shapes: I in, O out.
"""

from typing import Any

import torch
from torch import Tensor

from veneer.layers.kinds import Layer
from veneer.layers.weights.store import Store

_LARGEST = 127  # what the largest number of each row was rounded to
_ROWS = 32


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
    state = weight.quant_state
    if vars(state).get("packing_format_for_cpu"):
        return _unpacked(weight.data, state).to(state.original_dtype)
    return dequantize_4bit(weight.data, state)


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    """The weight where its first call in evaluation has reordered it for a CPU: 32 rows of two columns at a time."""
    rows, columns = state.shape
    two = packed.reshape(-1, _ROWS)  # of each byte the low half belongs to the first 32 numbers, the high to the next
    codes = torch.cat([two & 15, two >> 4], dim=1).reshape(rows // _ROWS, columns // 2, _ROWS, 2)
    codes_OI = codes.transpose(1, 2).reshape(rows, columns)
    largest_OI = state.absmax.T.float().repeat_interleave(state.blocksize, dim=1)
    return state.code[codes_OI.long()] * largest_OI


BITSANDBYTES_8BIT = Store("bnb 8bit", _holds_8bit, _read_8bit, None)
BITSANDBYTES_4BIT = Store("bnb 4bit", _holds_4bit, _read_4bit, None)

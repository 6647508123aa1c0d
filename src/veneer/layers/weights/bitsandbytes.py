"""Weights that bitsandbytes keeps in 8 or 4 bits.

Shapes: I in, O out.
"""

from typing import Any

import torch
from torch import Tensor, nn

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
    return _from_8bit(weight, weight.SCB if weight.SCB is not None else layer.state.SCB)


def _from_8bit(weight: Tensor, largest_O: Tensor) -> Tensor:
    return weight.detach().float() * (largest_O.to(weight.device, torch.float32) / _LARGEST).unsqueeze(1)


def _value_8bit(weight: Any) -> Tensor:
    return _from_8bit(weight, weight.SCB)


def _quantise_8bit(layer: Layer, parameter: str, W: Tensor) -> nn.Parameter:
    from bitsandbytes.functional import int8_vectorwise_quant

    codes_OI, largest_O, _ = int8_vectorwise_quant(W.detach().to(torch.float16))
    return type(layer._parameters[parameter])(codes_OI, requires_grad=False, CB=codes_OI, SCB=largest_O)


def _write_8bit(layer: Layer, parameter: str, weight: Tensor) -> None:
    """Put a weight in place; the one that leaves takes along what its first call gave to the layer."""
    leaving, state = layer._parameters[parameter], layer.state
    if state.SCB is not None:
        leaving.CB, leaving.SCB = leaving.data, state.SCB
    state.reset_grads()
    layer._parameters[parameter] = weight


def _holds_4bit(layer: Layer, parameter: str) -> bool:
    weight = layer._parameters.get(parameter)
    return _is(layer, parameter, "Params4bit") and weight.quant_state is not None and not weight.is_meta


def _read_4bit(layer: Layer, parameter: str) -> Tensor:
    """The (O, I) weight in the dtype that it had before."""
    return _value_4bit(layer._parameters[parameter])


def _value_4bit(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if vars(state).get("packing_format_for_cpu"):
        return _unpacked(weight.data, state).to(state.original_dtype)
    return dequantize_4bit(weight.data, state)


def keep_order(module: nn.Module) -> None:
    """Let bitsandbytes not reorder a 4-bit weight for a fast CPU on its first call in evaluation.

    What it computes from such a weight has no gradient: training after an evaluation would go on with wrong ones. One
    that was reordered is put back.
    """
    weight = module._parameters.get("weight")
    if type(weight).__name__ != "Params4bit":
        return
    if vars(getattr(weight, "quant_state", None) or object).get("packing_format_for_cpu"):
        module.state_dict()  # puts it back, for a file
    if "support_avx512bf16_for_cpu" in vars(module):
        vars(module)["support_avx512bf16_for_cpu"] = False


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    """The weight where its first call in evaluation has reordered it for a CPU: 32 rows of two columns at a time."""
    rows, columns = state.shape
    two = packed.reshape(-1, _ROWS)  # of each byte the low half belongs to the first 32 numbers, the high to the next
    codes = torch.cat([two & 15, two >> 4], dim=1).reshape(rows // _ROWS, columns // 2, _ROWS, 2)
    codes_OI = codes.transpose(1, 2).reshape(rows, columns)
    largest_OI = state.absmax.T.float().repeat_interleave(state.blocksize, dim=1)
    return state.code[codes_OI.long()] * largest_OI


def _quantise_4bit(layer: Layer, parameter: str, W: Tensor) -> nn.Parameter:
    from bitsandbytes.functional import quantize_4bit

    weight = layer._parameters[parameter]
    form = {
        "blocksize": weight.blocksize,
        "compress_statistics": weight.compress_statistics,
        "quant_type": weight.quant_type,
        "quant_storage": weight.quant_storage,
    }
    packed, state = quantize_4bit(W.detach().contiguous(), **form)
    made = {"requires_grad": False, "quant_state": state, "module": weight.module, "bnb_quantized": True}
    return type(weight)(packed, **form, **made)


def _write_4bit(layer: Layer, parameter: str, weight: Any) -> None:
    layer._parameters[parameter] = weight
    layer.quant_state = weight.quant_state  # from which bitsandbytes takes it where FSDP has rebuilt the parameter


BITSANDBYTES_8BIT = Store(
    "bnb 8bit", _holds_8bit, _read_8bit, _write_8bit, _quantise_8bit, _value_8bit, is_quantised=True
)
BITSANDBYTES_4BIT = Store(
    "bnb 4bit", _holds_4bit, _read_4bit, _write_4bit, _quantise_4bit, _value_4bit, is_quantised=True
)

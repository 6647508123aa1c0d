"""Weights that torchao keeps in few bits: tensors of its own classes, in layers that are `torch.nn.Linear` still."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.layers.kinds import Layer
from veneer.layers.weights.store import Store, read, value, write

_INPUTS = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
_ROUNDS_INPUTS = ("act_quant_kwargs", "activation_quantization")  # what the classes call that


def _is_torchao(weight: object) -> bool:
    return any(c.__name__ == "TorchAOBaseTensor" for c in type(weight).__mro__)


def _int8(weight: Any, W: Tensor) -> Tensor:
    form = {name: getattr(weight, name) for name in (*_INPUTS, "reduce_range")}
    make = partial(type(weight).from_hp, W, _granularity(weight), _mapping(weight), **form)
    return _nearer(W, make(), make(scale=weight.scale, zero_point=weight.zero_point))


def _intx(weight: Any, W: Tensor) -> Tensor:
    form = {"activation_quantization": weight.activation_quantization}
    make = partial(type(weight).from_hp, W, tuple(weight.block_size), weight.target_dtype, **form)

    def scaled(scale: Tensor, zero_point: Tensor) -> Tensor:
        return make(intx_choose_qparams_algorithm=None, custom_scale=scale, custom_zero_point=zero_point)

    found = make(mapping_type=_mapping(weight))
    if found.scale.dtype != weight.scale.dtype:
        found = scaled(found.scale.to(weight.scale.dtype), found.zero_point)
    return _nearer(W, found, scaled(weight.scale, weight.zero_point))


def _nearer(W: Tensor, *made: Any) -> Tensor:
    """Of weights with scales of their own and with those of before, the nearer one.

    torchao's scales reach a step further on one side than on the other: found anew from rounded numbers they come out
    smaller, and every number is rounded again.
    """
    return min(made, key=lambda one: float(torch.linalg.vector_norm(one.dequantize() - W)))


def _float8(weight: Any, W: Tensor) -> Tensor:
    return type(weight).from_hp(
        W,
        float8_dtype=weight.qdata.dtype,
        granularity=_granularity(weight),
        mm_config=weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )


def _granularity(weight: Any) -> Any:
    """What shares one scale, as a torchao config says it."""
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    *before, last = weight.block_size
    if tuple(weight.block_size) == tuple(weight.shape):
        return PerTensor()
    assert all(size == 1 for size in before)
    return PerRow() if last == weight.shape[-1] else PerGroup(last)


def _mapping(weight: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    centred = weight.zero_point is None or not weight.zero_point.any()
    return MappingType.SYMMETRIC if centred else MappingType.ASYMMETRIC


_QUANTISE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
}


def _holds(layer: Layer, parameter: str) -> bool:
    weight = layer._parameters.get(parameter)
    return _is_torchao(weight) and type(weight).__name__ in _QUANTISE and not weight.is_meta


def _holds_to_read(layer: Layer, parameter: str) -> bool:
    """Whether it is of another class that can be read: those laid out for one kernel often cannot."""
    weight = layer._parameters.get(parameter)
    own = [c for c in type(weight).__mro__ if c.__module__.startswith("torchao.")]
    return _is_torchao(weight) and not weight.is_meta and any("dequantize" in vars(c) for c in own)


def _quantise(layer: Layer, parameter: str, W: Tensor) -> nn.Parameter:
    weight = layer._parameters[parameter]
    with torch.no_grad():
        rounded = _QUANTISE[type(weight).__name__](weight, W.detach())
    return nn.Parameter(rounded, requires_grad=False)


def rounds_inputs(weight: object) -> bool:
    """Whether a layer rounds its inputs too, by operations of torchao through which no gradient passes."""
    return _is_torchao(weight) and any(getattr(weight, name, None) is not None for name in _ROUNDS_INPUTS)


TORCHAO = Store("torchao", _holds, read, write, _quantise, value, is_quantised=True)
TORCHAO_TO_READ = Store("torchao", _holds_to_read, read, None, None, value, is_quantised=True)

"""Which layers take the fast path, functional/lora_linear.py, and why the others take the plain one.

The fast path is for what most layers are: a frozen `torch.nn.Linear` with one plain adapter. It computes the same. A
layer with a quantised weight takes it too: it computes its own output, and its weight is read again in the backward
pass, where torchao's own way keeps each layer's in full precision from the forward pass on.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.functional import lora_linear
from veneer.functional.transforms import is_plain, is_transformed
from veneer.layers import shared_input
from veneer.layers.kinds import Kind, Layer
from veneer.layers.kinds.kind import linear_update
from veneer.layers.sharded import is_partitioned
from veneer.layers.weights import is_quantised, reader

if TYPE_CHECKING:
    from veneer.layers.adapter import Adapter

_MOST_DROPPED = 0.5  # above, drawing a mask is cheaper than drawing places


def why_plain(layer: Layer, adapter: "Adapter") -> str | None:
    """What about the layer or its adapter asks for the plain path, in words; None if nothing does."""
    if not isinstance(getattr(adapter, "kind", None), Kind):
        return "the layer reads its weight"
    if adapter.kind.update is not linear_update:
        return f"the layer is {adapter.kind.name}"
    if adapter.lora_bias is not None:
        return "lora_bias"
    if not isinstance(adapter.scale, float | int):
        return "the scale is a tensor"
    if not is_dense(layer) and is_quantised(layer):
        return _why_plain_quantised(layer, adapter)
    if not _runs_linear(type(layer)):
        return "the layer's forward is not torch.nn.Linear's"
    if not (is_plain(layer.weight) and is_plain(layer.bias)):
        return f"the weight is a {type(layer.weight).__name__}"
    if layer.weight.requires_grad:
        return "the weight is trained"
    return _why_dtypes(layer.weight.dtype, adapter.lora_A.dtype)


def takes_fast_path(layer: Layer, adapter: "Adapter", x: Tensor) -> bool:
    """Whether this call of the layer may take the fast path."""
    if is_transformed() or not is_plain(x) or why_plain(layer, adapter) is not None:
        return False
    if not is_dense(layer):
        cast = _is_cast_away(x) or _why_dtypes(x.dtype, adapter.lora_A.dtype) is not None
        return not cast and x.numel() > 0 and not (adapter.training and adapter.dropout > _MOST_DROPPED)
    return (x.dtype == layer.weight.dtype or _is_cast(layer, x)) and not (
        adapter.training and adapter.dropout > _MOST_DROPPED
    )


def frozen_with_update(layer: Layer, adapter: "Adapter", x: Tensor) -> Tensor:
    """The output of a layer that takes the fast path, with the adapter."""
    if not is_dense(layer):
        passed, h, B = _projected(layer, adapter, x)
        return lora_linear.frozen_layer(passed, _beneath(layer), reader(layer), h, B, float(adapter.scale))
    x, W, bias = as_computed(layer, x)
    passed, h, B = _projected(layer, adapter, x)
    return lora_linear.frozen_linear(passed, W, bias, h, B, float(adapter.scale))


def _projected(layer: Layer, adapter: "Adapter", x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as the frozen layer should read it, drop(x) Aᵀ, and B in x's dtype."""
    p = adapter.dropout if adapter.training else 0.0
    A, B = adapter.factors()
    if p or adapter.start_A is not None or x.is_inference():
        passed, (h,) = lora_linear.project(x, [A.to(x.dtype)], p)
    else:
        passed, h = shared_input.project(layer, adapter, x, _joins_in)
    return passed, h, B.to(x.dtype)


def as_computed(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The input, weight and bias in the dtype that the layer computes in: autocast's, where that is on."""
    W, bias = layer.weight, layer.bias
    if not _is_cast(layer, x):
        return x, W, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype)


def _joins_in(layer: Layer, adapter: "Adapter") -> bool:
    """Whether a layer's product may be made in the forward of another, which it cannot where something (FSDP) made
    the layer a class of its own: it would gather and reduce its parameters by itself. So does ZeRO 3."""
    return (
        _is_front(layer)
        and why_plain(layer, adapter) is None
        and type(adapter.lora_A) is nn.Parameter
        and not is_partitioned(adapter.lora_A)
        and adapter.start_A is None
        and not (adapter.training and adapter.dropout)
        and layer._veneer_merged is None
    )


def _is_front(layer: Layer) -> bool:
    return "_veneer_front" in vars(type(layer))


def is_dense(layer: Layer) -> bool:
    """Whether the layer is a linear one over a plain tensor."""
    return _runs_linear(type(layer)) and is_plain(layer.weight)


def _why_plain_quantised(layer: Layer, adapter: "Adapter") -> str | None:
    if not _is_front(layer):
        return "the quantised weight is sharded"
    if layer.bias is not None and layer.bias.requires_grad:
        return "the bias is trained"
    if adapter.rule == "dora" and adapter.training and adapter.dropout:
        return "DoRA with dropout on a quantised weight"
    return None


def _beneath(layer: Layer) -> Callable[[Tensor], Tensor]:
    """The layer's own forward, without adapters."""
    from veneer.layers.attach import Adapted

    return super(Adapted, layer).forward  # type: ignore[misc]


def _is_cast(layer: Layer, x: Tensor) -> bool:
    """Whether autocast brings the input and the weight to one dtype; it leaves float64 alone."""
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, layer.weight.dtype)


def _is_cast_away(x: Tensor) -> bool:
    """Whether autocast brings the input to another dtype than it has."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device)


@cache
def _runs_linear(cls: type[nn.Module]) -> bool:
    """Whether what is beneath the adapters of such a layer is `torch.nn.Linear.forward`."""
    from veneer.layers.attach import Adapted

    beneath = cls.__mro__[cls.__mro__.index(Adapted) + 1 :]
    return next(c for c in beneath if "forward" in vars(c)) is nn.Linear


def _why_dtypes(weight: torch.dtype, factors: torch.dtype) -> str | None:
    """Factors are rounded to bfloat16 where the layer computes in it, as autocast does; gradients of float16 fade."""
    if weight == factors and weight.is_floating_point:
        return None
    if weight == torch.bfloat16 and factors == torch.float32:
        return None
    return f"{factors} factors on a {weight} weight".replace("torch.", "")

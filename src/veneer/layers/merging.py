"""The weights of one layer with adapters in them, and a layer that has them in place by itself.

Sums are made in float64 on a CPU, else in float32, and rounded once; where the weight is quantised, once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.errors import MergeError
from veneer.functional.finite import all_finite
from veneer.functional.rounded_sum import add_products, exact_dtype, stays_finite
from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer
from veneer.layers.weights import (
    Elsewhere,
    Loss,
    check_writable,
    is_quantised,
    kept,
    put_back,
    quantised,
    read,
    write,
)


@dataclass
class MergedHere:
    """What a layer has in its weights by itself: the adapters' names, and the base's own parameters by name."""

    names: tuple[str, ...]
    originals: dict[str, nn.Parameter | Elsewhere]


def merged_values(
    layer: Layer,
    parameter: str,
    adapters: Sequence[Adapter],
    what: str,
    original: Tensor | None = None,
    *,
    checked: bool = False,
    losses: dict[str, Loss] | None = None,
) -> dict[str, Tensor]:
    """A weight with these adapters in it, and the layer's bias if it changes, by the parameters' names.

    what      what an error calls the layer
    original  the weight before any adapter, if the layer has others in its weight already
    checked   whether `check_merge` has passed
    losses    where it is put down, under `what`, what rounding a quantised weight again costs; None if that is not
              allowed

    Raises MergeError if the layer cannot take them in, or would overflow.
    """
    if not checked:
        _check_place(layer, parameter, adapters, what, requantize=losses is not None)
    with torch.no_grad():
        merged = _merged_weight(layer, parameter, adapters, original)
        bias = _merged_bias(layer, parameter, adapters, original)
    if not checked:
        _check_values(layer, adapters, what, merged, bias)
    if losses is not None and is_quantised(layer, parameter):
        merged, losses[what] = quantised(layer, parameter, merged)
    return {parameter: merged} if bias is None else {parameter: merged, "bias": bias}


def check_merge(
    layer: Layer, parameter: str, adapters: Sequence[Adapter], what: str, *, requantize: bool = False
) -> None:
    """Raise the MergeError that `merged_values` would raise, where it can be told without making the sum."""
    _check_place(layer, parameter, adapters, what, requantize=requantize)
    kind, W = adapters[0].kind, read(layer, parameter)
    plain = kind.never_refuses_merge and not any(a.rule != "add" or a.lora_bias is not None for a in adapters)
    with torch.no_grad():
        if plain and stays_finite(kind.matrices_in(W), [_product(adapter) for adapter in adapters]):
            return
    merged_values(layer, parameter, adapters, what, losses={} if requantize else None)


def _check_place(
    layer: Layer, parameter: str, adapters: Sequence[Adapter], what: str, *, requantize: bool = False
) -> None:
    check_writable(layer, parameter, what, requantize=requantize)
    if (groups := adapters[0].kind.groups(layer)) > 1:
        raise MergeError(
            f"{what} has groups={groups}: each output sees the inputs of its group, with the adapter all of them, "
            "which its weight cannot express"
        )


def _check_values(layer: Layer, adapters: Sequence[Adapter], what: str, merged: Tensor, bias: Tensor | None) -> None:
    if _adds_bias(adapters) and bias is None:
        raise MergeError(f"{what} has no bias that could take in the adapter's (lora_bias)")
    if why := adapters[0].kind.refuse_merge(layer, merged):
        raise MergeError(f"{what}: {why}")
    if not all_finite(merged) or (bias is not None and not all_finite(bias)):
        raise MergeError(
            f"{what} ({merged.dtype}) would hold NaN or infinity: the adapter is broken, or its update too large "
            "for the dtype of the base (merge over a float32 base then)"
        )


def merge_here(layer: Layer, names: Sequence[str]) -> None:
    """Put adapters into this layer's weights, on top of those it has in them. Raises MergeError."""
    here = layer._veneer_merged or MergedHere((), {})
    before = {name: one.read() if isinstance(one, Elsewhere) else one for name, one in here.originals.items()}
    for parameter, value in layer._veneer_merged_with(names, before).items():
        here.originals.setdefault(parameter, kept(layer, parameter))
        write(layer, parameter, value)
    layer._veneer_merged = MergedHere((*here.names, *names), here.originals)
    layer._veneer_route.count_merged(names, 1)


def unmerge_here(layer: Layer) -> None:
    """Put the weights back that the layer had before, bit for bit."""
    here: MergedHere | None = layer._veneer_merged
    if here is None:
        return
    for parameter, original in here.originals.items():
        put_back(layer, parameter, original)
    del layer._veneer_merged
    layer._veneer_route.count_merged(here.names, -1)


def _adds_bias(adapters: Sequence[Adapter]) -> bool:
    """Whether one of the adapters has a bias of its own."""
    return any(adapter.lora_bias is not None for adapter in adapters)


def _merged_weight(layer: Layer, parameter: str, adapters: Sequence[Adapter], original: Tensor | None) -> Tensor:
    now = read(layer, parameter)
    if all(adapter.rule == "add" for adapter in adapters):
        merged = _sum_in_blocks(adapters[0].kind.as_used(layer, now), adapters)
        if merged is not None:
            return merged
    base = _base(layer, adapters, now if original is None else original)
    total = base if original is None else _base(layer, adapters, now)
    for adapter in adapters:
        total = adapter.merged(total, base)
    return total.to(now.dtype)


def _sum_in_blocks(W: Tensor, adapters: Sequence[Adapter]) -> Tensor | None:
    """The weight with the adapters' updates, made some at a time; None if it is no matrix in its place."""
    merged, kind = torch.empty_like(W, requires_grad=False), adapters[0].kind
    place = kind.matrices_in(merged)
    if place.untyped_storage().data_ptr() != merged.untyped_storage().data_ptr():
        return None
    add_products(kind.matrices_in(W), [_product(adapter) for adapter in adapters], place)
    return merged


def _product(adapter: Adapter) -> tuple[Tensor, Tensor, float]:
    """The factors of each matrix's update, and what their product is multiplied by."""
    return *adapter.kind.factors_of(*adapter.factors()), float(adapter.scale)


def _merged_bias(layer: Layer, parameter: str, adapters: Sequence[Adapter], original: Tensor | None) -> Tensor | None:
    """The layer's bias with those of the adapters; None if none of them has one, or the layer has none.

    DoRA multiplies the output so far without the layer's own bias, and so the biases of adapters before it.
    """
    if layer._parameters.get("bias") is None or not _adds_bias(adapters):
        return None
    bias = read(layer, "bias")
    total = torch.zeros_like(bias, dtype=exact_dtype(bias))
    for adapter in adapters:
        if adapter.lora_magnitude_vector is not None:
            base = _base(layer, adapters, read(layer, parameter) if original is None else original)
            total = total * adapter.gain(base, adapter.delta(base.shape, base.dtype))
        if (delta := adapter.bias_delta(total.dtype)) is not None:
            total = total + delta
    return (bias.to(total.dtype) + total).to(bias.dtype)


def _base(layer: Layer, adapters: Sequence[Adapter], weight: Tensor) -> Tensor:
    """A weight as the layer uses it, in the dtype that sums are made in."""
    used = adapters[0].kind.as_used(layer, weight)
    return used.to(exact_dtype(used))

"""The norms that DoRA divides by, and when those of an earlier call still hold.

In training they are computed in every call, which costs little beside the layer's products. A call that generates one
token costs less than they do: there they are kept, as long as nothing they come from has changed.
"""

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from veneer.functional import dora
from veneer.functional.transforms import is_plain, is_transformed
from veneer.layers.kinds import Layer
from veneer.layers.sharded import is_partitioned

if TYPE_CHECKING:
    from veneer.layers.adapter import Adapter


class _Source(NamedTuple):
    """A tensor as it was. It is not held, even weakly: `torch.utils.swap_tensors` refuses one that is.

    state   which one it was, and what counts its changes
    sample  some of its numbers
    """

    state: tuple[object, ...]
    sample: Tensor


class _Kept(NamedTuple):
    sources: tuple[_Source, ...]
    scale: float
    norms_O: Tensor


_KEPT: "weakref.WeakKeyDictionary[Adapter, _Kept]" = weakref.WeakKeyDictionary()


def norms(adapter: "Adapter", layer: Layer, W: Tensor) -> Tensor:
    """‖W + sBA‖ of each output row, of shape (O,), for the layer's weight W as it was read; in float32 at least.

    In evaluation without gradients, and on a CPU, the norms of the last call are used again if W, A, B and the scale
    are the same tensors at the same version. Edits through `.data` do not count as a version: some numbers of each row
    and column are compared, too, and any call that trains ends it. An edit that evades all that must be of single
    numbers, through `.data`, between two calls in evaluation.
    """
    if is_transformed():
        return _computed(adapter, W)
    if not _may_keep(adapter, layer, W):
        _KEPT.pop(adapter, None)
        return _computed(adapter, W)
    kept = _KEPT.get(adapter)
    tensors, scale = (W, *_factors(adapter)), float(adapter.scale)
    if kept is not None and kept.scale == scale and _same(tensors, kept.sources):
        return kept.norms_O
    found = _computed(adapter, W)
    _KEPT[adapter] = _Kept(tuple(_Source(_state(t), _sample(t).clone()) for t in tensors), scale, found)
    return found


def gain(adapter: "Adapter", layer: Layer, W: Tensor) -> Tensor:
    """m / ‖W + sBA‖, of shape (O,): what DoRA multiplies each output by; in float32 at least."""
    assert adapter.lora_magnitude_vector is not None
    return dora.gain(adapter.lora_magnitude_vector, norms(adapter, layer, W))


def _computed(adapter: "Adapter", W: Tensor) -> Tensor:
    kind, (A, B) = adapter.kind, adapter.factors()
    if kind.delta is None:
        return dora.row_norms(kind.to_matrix(W.detach()), A.detach().flatten(1), B.detach().flatten(1), adapter.scale)
    dtype = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
    with torch.no_grad():
        return kind.row_norms(W.to(dtype) + adapter.delta(W.shape, dtype))


def _factors(adapter: "Adapter") -> Iterator[Tensor]:
    factors = (adapter.lora_A, adapter.lora_B, adapter.start_A, adapter.start_B)
    return (factor for factor in factors if factor is not None)


def _may_keep(adapter: "Adapter", layer: Layer, W: Tensor) -> bool:
    """Whether all that the norms come from are tensors that stay between calls and count their changes.

    On other devices than a CPU, comparing numbers would make each call wait for the device.
    """
    return (
        not torch.is_grad_enabled()
        and not adapter.training
        and W is layer._parameters.get("weight")
        and type(W) is nn.Parameter
        and W.device.type == "cpu"
        and not is_partitioned(W)
        and all(is_plain(t) and t.device == W.device and not t.is_inference() for t in (W, *_factors(adapter)))
    )


def _same(tensors: tuple[Tensor, ...], sources: tuple[_Source, ...]) -> bool:
    return len(tensors) == len(sources) and all(
        source.state == _state(tensor) and torch.equal(source.sample, _sample(tensor))
        for tensor, source in zip(tensors, sources, strict=True)
    )


def _state(tensor: Tensor) -> tuple[object, ...]:
    return id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _sample(tensor: Tensor) -> Tensor:
    """One number of each row and, where there are as many rows, of each column: those a row less one apart."""
    numbers = tensor.detach().reshape(-1)
    return numbers[:: max(1, tensor.shape[-1] - 1)]

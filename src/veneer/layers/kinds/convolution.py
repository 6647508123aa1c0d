"""`torch.nn.Conv1d`, `Conv2d` and `Conv3d`, with any stride, padding, dilation and groups.

A convolution without groups is a matrix (O, C·K) on the patches of its input. With groups, A sees all channels: the
update is a convolution without groups, which no grouped weight can take in.

Shapes: C channels in, O out, R rank, G groups, K the sizes of the kernel.
"""

import math
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from veneer.functional.convolution import Window, convolve, delta_convolution, update_convolution
from veneer.layers.kinds.kind import Kind, Layer, Number, Shape, not_yet_sized, owner_of

_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.out_channels, layer.in_channels * math.prod(layer.kernel_size)


def _factors(layer: Layer, shape: tuple[int, int], rank: int) -> tuple[Shape, Shape]:
    kernel = tuple(layer.kernel_size)
    return (rank, layer.in_channels, *kernel), (layer.out_channels, rank // layer.groups, *(1 for _ in kernel))


def _window(layer: Layer) -> Window:
    return Window(layer.stride, layer.padding, layer.dilation, layer.padding_mode)


def _update(layer: Layer, x: Tensor, A: Tensor, B: Tensor, scale: Number, p: float) -> Tensor:
    return update_convolution(F.dropout(x, p), A, B, scale, _window(layer), groups=layer.groups)


def _base_update(
    layer: Layer, x: Tensor, y: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: Number, p: float
) -> tuple[Tensor, Tensor]:
    if p == 0:
        base = y if layer.bias is None else y - _over_positions(layer.bias, len(layer.kernel_size))
    else:
        x = F.dropout(x, p)
        kernels = W.reshape(W.shape[0], -1, *layer.kernel_size).to(x.dtype)
        base = convolve(x, kernels, _window(layer), groups=layer.groups)
    return base, _update(layer, x, A, B, scale, 0.0)


def _over_positions(v_O: Tensor, dimensions: int) -> Tensor:
    return v_O.reshape(-1, *(1,) * dimensions)


def _spread(v_O: Tensor, y: Tensor, *, dimensions: int) -> Tensor:
    return _over_positions(v_O, dimensions)


def _magnitude(layer: Layer, out_channels: int) -> Shape:
    return (1, out_channels, *(1 for _ in layer.kernel_size))


def _to_matrix(W: Tensor) -> Tensor:
    return W.flatten(1)


def _delta(A: Tensor, B: Tensor, scale: Number, shape: Shape) -> Tensor:
    return delta_convolution(A, B, scale)


def _groups(layer: Layer) -> int:
    return layer.groups


def _refuse(layer: Layer) -> str | None:
    if why := not_yet_sized(layer):
        return why
    for method in ("forward", "_conv_forward"):
        owner = owner_of(layer, method, _CLASSES)
        if owner not in _CLASSES:
            return f"{owner.__name__} computes more than a convolution, so what an adapter would add cannot be told"
    return None


def _clash(layer: Layer, site: Any) -> str | None:
    if site.rank % layer.groups:
        return (
            f"groups={layer.groups} must divide its rank, and {site.rank} is no multiple of it; set r or rank_pattern"
        )
    if site.dora and layer.groups > 1:
        return (
            f"use_dora: with groups={layer.groups} the update reaches across groups and the weight does not, so that "
            "their sum has no norm; use plain LoRA, or leave the layer out"
        )
    return None


def _convolution(dimensions: int) -> Kind:
    return Kind(
        f"conv{dimensions}d",
        _dims,
        update=_update,
        base_update=_base_update,
        factors=_factors,
        to_matrix=_to_matrix,
        delta=_delta,
        spread=partial(_spread, dimensions=dimensions),  # y may or may not have a batch
        magnitude=_magnitude,
        groups=_groups,
        linear=False,
        refuse=_refuse,
        clash=_clash,
    )


CONV1D, CONV2D, CONV3D = map(_convolution, (1, 2, 3))

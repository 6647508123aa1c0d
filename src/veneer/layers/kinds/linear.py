"""`torch.nn.Linear` and everything derived from it, quantised or not. Shapes: I in, O out, R rank."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from veneer.functional import lowrank
from veneer.layers.kinds.kind import Kind, Layer


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def update(layer: Layer, x: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, p: float) -> Tensor:
    """s · B A drop(x)."""
    return lowrank.update_linear(F.dropout(x, p), A_RI, B_OR, scale)


def base_update(
    layer: Layer, x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, p: float, *, W_OI: Tensor
) -> tuple[Tensor, Tensor]:
    """W drop(x) without the bias, taken from the output y where nothing is dropped, and s · B A drop(x)."""
    if p == 0:
        base = y if layer.bias is None else y - layer.bias
    else:
        x = F.dropout(x, p)
        base = F.linear(x, W_OI.to(x.dtype))
    return base, lowrank.update_linear(x, A_RI, B_OR, scale)


def _base_update(
    layer: Layer, x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, p: float
) -> tuple[Tensor, Tensor]:
    return base_update(layer, x, y, A_RI, B_OR, scale, p, W_OI=layer.weight)


def _identity(W_OI: Tensor) -> Tensor:
    return W_OI


def _refuse(layer: Layer) -> str | None:
    if isinstance(layer.weight, UninitializedParameter):
        return "its size is not known before its first call; call the model once"
    return None


LINEAR = Kind(
    name="linear",
    dims=_dims,
    update=update,
    base_update=_base_update,
    to_matrix=_identity,
    from_matrix=_identity,
    inits={True: "kaiming", False: "kaiming_both"},
    linear=True,
    refuse=_refuse,
)

"""transformers' `Conv1D` (GPT-2): a linear layer that stores its weight as (I, O). Shapes: I in, O out, R rank."""

import torch.nn.functional as F
from torch import Tensor

from veneer.functional import lowrank
from veneer.layers.kinds.kind import Kind, Layer


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.weight.shape[1], layer.weight.shape[0]


def _update(layer: Layer, x: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, p: float) -> Tensor:
    return lowrank.update_linear(F.dropout(x, p), A_RI, B_OR, scale)


def _base_update(
    layer: Layer, x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, p: float
) -> tuple[Tensor, Tensor]:
    if p == 0:
        base = y - layer.bias
    else:
        x = F.dropout(x, p)
        base = F.linear(x, layer.weight.T.to(x.dtype))
    return base, lowrank.update_linear(x, A_RI, B_OR, scale)


def _transpose(W: Tensor) -> Tensor:
    return W.T


CONV1D = Kind(
    name="conv1d",
    dims=_dims,
    update=_update,
    base_update=_base_update,
    to_matrix=_transpose,
    from_matrix=_transpose,
    inits={True: "kaiming", False: "kaiming_both"},
    linear=True,
    fan_in_fan_out=True,
)

"""transformers' `Conv1D` (GPT-2): a linear layer that stores its weight as (I, O). Shapes: I in, O out, R rank."""

from torch import Tensor

from veneer.layers.kinds import linear
from veneer.layers.kinds.kind import Kind, Layer


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.weight.shape[1], layer.weight.shape[0]


def _base_update(
    layer: Layer, x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, p: float
) -> tuple[Tensor, Tensor]:
    return linear.base_update(layer, x, y, A_RI, B_OR, scale, p, W_OI=layer.weight.T)


def _transpose(W: Tensor) -> Tensor:
    return W.T


CONV1D = Kind(
    name="conv1d",
    dims=_dims,
    update=linear.update,
    base_update=_base_update,
    to_matrix=_transpose,
    from_matrix=_transpose,
    inits={True: "kaiming", False: "kaiming_both"},
    linear=True,
    fan_in_fan_out=True,
)

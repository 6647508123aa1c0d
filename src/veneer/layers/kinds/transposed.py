"""transformers' `Conv1D` (GPT-2): a linear layer, no convolution, that stores its weight as (I, O).

Shapes: I in, O out.
"""

from torch import Tensor

from veneer.layers.kinds.kind import Kind, Layer, Shape
from veneer.layers.sharded import shape_of


def _dims(layer: Layer) -> tuple[int, int]:
    inner, outer = shape_of(layer.weight)
    return outer, inner


def _to_matrix(W_IO: Tensor) -> Tensor:
    return W_IO.T


def _from_matrix(W_OI: Tensor, shape: Shape) -> Tensor:
    return W_OI.T


TRANSPOSED = Kind("transposed linear", _dims, to_matrix=_to_matrix, from_matrix=_from_matrix, fan_in_fan_out=True)

"""An output head whose weight is the embedding's: one adapter serves both, and the head reads it transposed.

The embedding's matrix is W (D, V), its update BA with A (R, V) and B (D, R); the head's update is (BA)ᵀ = AᵀBᵀ.
D width, R rank, V vocabulary.
"""

from torch import Tensor

from veneer.layers.kinds.kind import Kind, Layer, Number, Shape, linear_update
from veneer.layers.kinds.linear import LINEAR


def _update(layer: Layer, x: Tensor, A_RV: Tensor, B_DR: Tensor, scale: Number, p: float) -> Tensor:
    return linear_update(layer, x, B_DR.T, A_RV.T, scale, p)


def _product(A_RV: Tensor, B_DR: Tensor) -> tuple[Tensor, Tensor]:
    return B_DR.T, A_RV.T


def _factors(layer: Layer, shape: tuple[int, int], rank: int) -> tuple[Shape, Shape]:
    vocabulary, width = shape
    return (rank, vocabulary), (width, rank)


TIED_HEAD = Kind(
    "linear",
    LINEAR.dims,
    update=_update,
    factors=_factors,
    product=_product,
    bias=False,
    on_disk=("lora_B.weight", "lora_A.weight"),
    refuse=LINEAR.refuse,
)

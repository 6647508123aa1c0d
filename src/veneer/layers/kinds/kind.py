"""The shape of a table entry: what Veneer must know about a kind of layer.

A linear map on the last dimension needs no more than its size: every other member defaults to what `torch.nn.Linear`
does. Shapes: I in, O out, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from veneer.functional import lowrank

if TYPE_CHECKING:
    from veneer.layers.kinds.parameter import Stack

# A layer: an `nn.Module` with the attributes of its kind, which no one type in torch describes.
Layer = Any
Shape = tuple[int, ...]
Number = float | Tensor  # a scale: a float, or a tensor of no dimensions


def linear_update(layer: Layer, x: Tensor, A_RI: Tensor, B_OR: Tensor, scale: Number, p: float) -> Tensor:
    """s · B A drop(x) on the last dimension of x."""
    return lowrank.update_linear(F.dropout(x, p), A_RI, B_OR, scale)


def linear_base_update(
    layer: Layer, x: Tensor, y: Tensor, W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: Number, p: float
) -> tuple[Tensor, Tensor]:
    """W drop(x) without the bias, taken from the output y where nothing is dropped, and s · B A drop(x)."""
    if p == 0:
        base = y if layer.bias is None else y - layer.bias
    else:
        x = F.dropout(x, p)
        base = F.linear(x, W_OI.to(x.dtype))
    return base, lowrank.update_linear(x, A_RI, B_OR, scale)


def matrix_factors(layer: Layer, shape: tuple[int, int], rank: int) -> tuple[Shape, Shape]:
    """A of shape (R, I), B of shape (O, R)."""
    out_features, in_features = shape
    return (rank, in_features), (out_features, rank)


def same_matrix(W_OI: Tensor) -> Tensor:
    """The weight, which is the matrix."""
    return W_OI


def reshaped(W_OI: Tensor, shape: Shape) -> Tensor:
    """The matrix in the weight's shape."""
    return W_OI.reshape(shape)


def as_matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A as (R, I), B as (O, R)."""
    return A.flatten(1), B.flatten(1)


def last_dimension(v_O: Tensor, y: Tensor) -> Tensor:
    """The vector as it is: outputs lie in the last dimension."""
    return v_O


def not_yet_sized(layer: Layer) -> str | None:
    """Why a layer that learns its size from its first input cannot be adapted yet; None for any other."""
    if isinstance(layer.weight, UninitializedParameter):
        return "its size is not known before its first call; call the model once"
    return None


def owner_of(layer: Layer, method: str, classes: tuple[type, ...]) -> type:
    """The class whose `method` a layer of one of these classes runs, beneath the adapters."""
    return next(cls for cls in type(layer).__mro__ if method in vars(cls) and issubclass(cls, classes))


def _flat_magnitude(layer: Layer, out_features: int) -> Shape:
    return (out_features,)


def _ungrouped(layer: Layer) -> int:
    return 1


def _unchanged(layer: Layer, W: Tensor) -> Tensor:
    return W


def _no_reason(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Kind:
    """One kind of layer. All members are pure functions; shapes: I in, O out, R rank.

    name          what previews and errors call it
    dims          (layer) -> (O, I)
    update        (layer, x, A, B, scale, p) -> s·BA·drop(x), shaped like the layer's output
    base_update   (layer, x, y, W, A, B, scale, p) -> (W·drop(x) without bias, s·BA·drop(x)); W is the (O, I) matrix,
                  y the layer's output
    factors       (layer, (O, I), R) -> the shapes of A and B
    to_matrix     (W) -> the weight as an (O, I) matrix
    from_matrix   (matrix, shape of W) -> its inverse
    delta         (A, B, scale, shape of W) -> s·BA as a weight; None: the product of A and B as matrices
    product       (A, B) -> matrices (R, I) and (O, R) whose product is the update as a matrix
    spread        (v of shape (O,), y) -> v so that it multiplies the outputs of y
    magnitude     (layer, O) -> the shape of a DoRA magnitude in an adapter file
    groups        (layer) -> in how many groups the outputs are, each of which sees its own part of the rank. With more
                  than one, A sees inputs that the weight does not: no weight can take the update in
    as_used       (layer, W) -> the weight as the layer's forward uses it, if that differs from what it keeps
    inits         what `init_lora_weights` True and False mean for this kind, as names of initialisers
    linear        whether "all-linear" includes it
    by_matrix     whether initialisations that look at the weight may see it as a matrix
    bias          whether `lora_bias` can be added to it
    fan_in_fan_out  whether the weight is stored as (I, O); only a note for readers of the adapter's config
    on_disk       how the factors are called in an adapter file
    refuse        (layer) -> why this very layer cannot be adapted, or None
    clash         (layer, site) -> why it cannot be adapted with this rank, rule or dropout, or None
    refuse_merge  (layer, W) -> why W, the merged weight, cannot stand in the layer, or None
    stack         for a parameter that its module reads: the matrices it holds. Such an adapter acts by its weight, in
                  `merged`; the members that look at a layer's input are not used
    """

    name: str
    dims: Callable[[Layer], tuple[int, int]]
    update: Callable[[Layer, Tensor, Tensor, Tensor, Number, float], Tensor] = linear_update
    base_update: Callable[[Layer, Tensor, Tensor, Tensor, Tensor, Tensor, Number, float], tuple[Tensor, Tensor]] = (
        linear_base_update
    )
    factors: Callable[[Layer, tuple[int, int], int], tuple[Shape, Shape]] = matrix_factors
    to_matrix: Callable[[Tensor], Tensor] = same_matrix
    from_matrix: Callable[[Tensor, Shape], Tensor] = reshaped
    delta: Callable[[Tensor, Tensor, Number, Shape], Tensor] | None = None
    product: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = as_matrices
    spread: Callable[[Tensor, Tensor], Tensor] = last_dimension
    magnitude: Callable[[Layer, int], Shape] = _flat_magnitude
    groups: Callable[[Layer], int] = _ungrouped
    as_used: Callable[[Layer, Tensor], Tensor] = _unchanged
    inits: tuple[str, str] = ("kaiming", "kaiming_both")
    linear: bool = True
    by_matrix: bool = True
    bias: bool = True
    fan_in_fan_out: bool = False
    on_disk: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    refuse: Callable[[Layer], str | None] = _no_reason
    clash: Callable[[Layer, Any], str | None] = _no_reason
    refuse_merge: Callable[[Layer, Tensor], str | None] = _no_reason
    stack: "Stack | None" = None

    @property
    def matrices(self) -> int:
        """How many matrices one weight holds, each with factors of its own; O of the weight counts them all."""
        return 1 if self.stack is None else self.stack.matrices

    @property
    def never_refuses_merge(self) -> bool:
        """Whether any finite weight can stand in such a layer."""
        return self.refuse_merge is _no_reason

    def weight_delta(self, A: Tensor, B: Tensor, scale: Number, shape: Shape) -> Tensor:
        """The update s·BA in the shape of the weight."""
        if self.delta is not None:
            return self.delta(A, B, scale, shape)
        return self.from_matrix(lowrank.delta(*self.product(A, B), scale), shape)

    def matrices_in(self, W: Tensor) -> Tensor:
        """The N matrices that a weight holds, (N, O, I); a view of it where its place in memory allows that."""
        return self.to_matrix(W).unsqueeze(0) if self.stack is None else self.stack.matrices_in(W)

    def factors_of(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices (N, R, I) and (N, O, R) for those: their products are the updates."""
        if self.stack is not None:
            return self.stack.factors_of(A, B)
        A_RI, B_OR = self.product(A, B)
        return A_RI.unsqueeze(0), B_OR.unsqueeze(0)

    def summed(self, A: Tensor, B: Tensor, more_A: Tensor, more_B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the sum of two updates."""
        if self.stack is not None:
            return self.stack.summed(A, B, more_A, more_B)
        return torch.cat([A, more_A]), torch.cat([B, more_B], dim=1)

    def row_norms(self, W: Tensor) -> Tensor:
        """The Euclidean norm of each output row of a weight, of shape (O,)."""
        return torch.linalg.vector_norm(self.to_matrix(W), dim=1)

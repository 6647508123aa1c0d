"""A parameter that its module reads: one matrix, or a stack of them such as a layer's fused experts.

Shapes: E matrices in the stack, I in, O out, R rank. The factors of a stack lie in two matrices, as in PEFT's files:
A of shape (E·R, I) matrix after matrix, B of shape (O, R·E) with the matrices innermost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from veneer.layers.kinds.kind import Kind, Layer, Number, Shape
from veneer.layers.sharded import shape_of


@dataclass(frozen=True)
class Stack:
    """How E matrices of shape (O, I) are kept in one parameter; one matrix may go without the dimension of E.

    transposed  whether each is kept as (I, O)
    """

    matrices: int
    out_features: int
    in_features: int
    transposed: bool = False

    @classmethod
    def of(cls, parameter: Tensor, *, transposed: bool = False) -> "Stack":
        """The stack that a parameter of two or three dimensions is; two are always (O, I)."""
        shape = shape_of(parameter)
        if len(shape) == 2:
            return cls(1, shape[0], shape[1])
        matrices, rows, columns = shape
        return cls(matrices, columns, rows, True) if transposed else cls(matrices, rows, columns)

    def dims(self, layer: Layer) -> tuple[int, int]:
        """(E·O, I)."""
        return self.matrices * self.out_features, self.in_features

    def factors(self, layer: Layer, shape: tuple[int, int], rank: int) -> tuple[Shape, Shape]:
        """A of shape (E·R, I), B of shape (O, R·E)."""
        width = rank * self.matrices
        return (width, self.in_features), (self.out_features, width)

    def to_matrix(self, W: Tensor) -> Tensor:
        """The matrices one below the other, (E·O, I)."""
        return (W.transpose(1, 2) if self.transposed else W).reshape(-1, self.in_features)

    def from_matrix(self, W: Tensor, shape: Shape) -> Tensor:
        """The inverse of `to_matrix`."""
        return self._kept(W.reshape(self.matrices, self.out_features, self.in_features), shape)

    def delta(self, A: Tensor, B: Tensor, scale: Number, shape: Shape) -> Tensor:
        """s·BA of every matrix, in the shape of the parameter."""
        A_ERI, B_ORE = self._apart(A, B)
        return self._kept((B_ORE * scale).permute(2, 0, 1) @ A_ERI, shape)

    def matrices_in(self, W: Tensor) -> Tensor:
        """The matrices, (E, O, I): a view of the parameter."""
        whole = W.reshape(self.matrices, *W.shape[-2:])
        return whole.transpose(1, 2) if self.transposed else whole

    def factors_of(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of each matrix, (E, R, I) and (E, O, R)."""
        A_ERI, B_ORE = self._apart(A, B)
        return A_ERI, B_ORE.permute(2, 0, 1)

    def joined(self, A: Sequence[Tensor], B: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The factors of the stack from those of each matrix."""
        return torch.cat(list(A)), torch.stack(list(B), dim=2).reshape(self.out_features, -1)

    def summed(self, A: Tensor, B: Tensor, more_A: Tensor, more_B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the sum of two updates."""
        A_ERI, B_ORE = self._apart(A, B)
        more_A_ERI, more_B_ORE = self._apart(more_A, more_B)
        return (
            torch.cat([A_ERI, more_A_ERI], dim=1).reshape(-1, self.in_features),
            torch.cat([B_ORE, more_B_ORE], dim=1).reshape(self.out_features, -1),
        )

    def _apart(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return (
            A.reshape(self.matrices, -1, self.in_features),
            B.reshape(self.out_features, -1, self.matrices),
        )

    def _kept(self, W_EOI: Tensor, shape: Shape) -> Tensor:
        return (W_EOI.transpose(1, 2) if self.transposed else W_EOI).reshape(shape)


@cache
def parameter_kind(stack: Stack) -> Kind:
    """The kind of a parameter that holds such a stack."""
    return Kind(
        "parameter" if stack.matrices == 1 else f"{stack.matrices} stacked matrices",
        stack.dims,
        factors=stack.factors,
        to_matrix=stack.to_matrix,
        from_matrix=stack.from_matrix,
        delta=stack.delta,
        linear=False,
        bias=False,
        stack=stack,
    )


def _attention_dims(layer: Layer) -> tuple[int, int]:
    return 3 * layer.embed_dim, layer.embed_dim


def _refuse_attention(layer: Layer) -> str | None:
    if not layer._qkv_same_embed_dim:
        return "its kdim or vdim differs from embed_dim, so it has three weights of its own, which is not available yet"
    classes = (cls for cls in type(layer).__mro__ if issubclass(cls, nn.MultiheadAttention))
    owner = next(cls for cls in classes if "forward" in vars(cls))
    if owner is not nn.MultiheadAttention:
        return f"{owner.__name__} has a forward of its own, which may not read the weights that would be adapted"
    return None


# Named as a layer; what is adapted are two parameters, in_proj_weight and the weight of its out_proj.
ATTENTION = Kind("attention", _attention_dims, bias=False, refuse=_refuse_attention)

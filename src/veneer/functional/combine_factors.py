"""One layer's low-rank update, seen as matrices, whatever kind of layer its factors come from.

Linear and embedding factors are matrices already. A convolution's are A of shape (R, I, k...) and B of shape
(O, R, 1...), so its update is the matrix B A of shape (O, I·k). A grouped convolution has B of shape (O, R/G, 1...):
each block of O/G rows sees only its own R/G rows of A.

Shapes: I in (times the kernel), O out, R rank, G groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """A low-rank update, scale · B A: A of shape (R, I...), B of shape (O, R/G, ...)."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return self.A.shape[0]

    @property
    def groups(self) -> int:
        """How many blocks of rows a grouped convolution has; 1 for everything else."""
        return max(1, self.A.shape[0] // max(1, self.B.shape[1]))

    @property
    def size(self) -> tuple[int, int]:
        """(O, I): the shape of the update as a matrix."""
        return self.B.shape[0], self.A[:1].numel()

    def to(self, dtype: torch.dtype) -> "Update":
        """The same update with factors of another dtype."""
        return Update(self.A.to(dtype), self.B.to(dtype), self.scale)

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """The factors as matrices (A of shape (R/G, I), B of shape (O/G, R/G)), one pair for each group."""
        return list(zip(self.A.flatten(1).chunk(self.groups), self.B.flatten(1).chunk(self.groups), strict=True))

    def delta(self) -> Tensor:
        """The update as a matrix, scale · B A, of shape (O, I)."""
        return torch.cat([B_OR @ A_RI for A_RI, B_OR in self.blocks()]) * self.scale

    def with_blocks(self, blocks: Sequence[tuple[Tensor, Tensor]]) -> "Update":
        """Other factors for the same layer, of scale 1, from matrices as `blocks` gives them."""
        A_RI = torch.cat([A for A, _ in blocks])
        B_OR = torch.cat([B for _, B in blocks])
        return Update(A_RI.reshape(-1, *self.A.shape[1:]), B_OR.reshape(*B_OR.shape, *self.B.shape[2:]))

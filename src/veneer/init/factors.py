"""What an initialiser is given and what it answers. Shapes: I in, O out, R rank, K components."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """One weight to be adapted, as an (O, I) matrix whose values are read only if asked for.

    groups  in how many groups the outputs are, each of which sees its own part of the rank; then B is (O, R/groups),
            and the weight is no (O, I) matrix
    """

    out_features: int
    in_features: int
    device: torch.device
    read: Callable[[], Tensor]
    groups: int = 1

    @classmethod
    def of(cls, W_OI: Tensor) -> "Weight":
        """The weight that a plain matrix is."""
        return cls(W_OI.shape[0], W_OI.shape[1], W_OI.device, lambda: W_OI)


@dataclass(frozen=True)
class Factors:
    """The factors of one update: A of shape (R, I), B of shape (O, R).

    subtract  the update that they start with, s·B0·A0, is taken off the base, so that the layer starts unchanged:
              y = W x + s (B A − B0 A0) x, with frozen copies A0 and B0
    base      a matrix of shape (O, I) that stands in for the weight while this adapter acts; None for the weight itself
    frozen    which of "A" and "B" are not trained
    """

    A: Tensor
    B: Tensor
    subtract: bool = False
    base: Tensor | None = None
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Components:
    """Principal components of a layer's inputs, the leading one first.

    vectors          of shape (K, I), one a row
    singular_values  of shape (K,); only whitening asks for them
    """

    vectors: Tensor
    singular_values: Tensor | None = None

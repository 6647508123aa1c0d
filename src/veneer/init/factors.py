"""What an initialiser is given and what it answers. Shapes: I in, O out, R rank."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """One weight to be adapted, as an (O, I) matrix whose values are read only if asked for."""

    out_features: int
    in_features: int
    device: torch.device
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, W_OI: Tensor) -> "Weight":
        """The weight that a plain matrix is."""
        return cls(W_OI.shape[0], W_OI.shape[1], W_OI.device, lambda: W_OI)


@dataclass(frozen=True)
class Factors:
    """The factors of one update: A of shape (R, I), B of shape (O, R)."""

    A: Tensor
    B: Tensor

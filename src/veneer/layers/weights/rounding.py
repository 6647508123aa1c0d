"""What is lost where a weight is rounded to few bits."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Sums of squares over a weight, or over several: of what rounding changed, of the weight, and of the update.

    error   ‖rounded − wanted‖²
    weight  ‖wanted‖²
    update  ‖wanted − before‖²
    """

    error: float = 0.0
    weight: float = 0.0
    update: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error + other.error, self.weight + other.weight, self.update + other.update)

    @property
    def relative(self) -> float:
        """‖rounded − wanted‖ / ‖wanted‖."""
        return sqrt(self.error / self.weight) if self.weight else 0.0

    @property
    def of_update(self) -> float:
        """‖rounded − wanted‖ / ‖wanted − before‖: 1 where rounding changes as much as the adapter does."""
        return sqrt(self.error / self.update) if self.update else 0.0


def loss_of(before: Tensor, wanted: Tensor, rounded: Tensor) -> Loss:
    """What it costs that a weight becomes `rounded` where `wanted` was meant; `before` is what it was."""
    return Loss(_squares(rounded, wanted), _squares(wanted), _squares(wanted, before))


def _squares(W: Tensor, other: Tensor | None = None) -> float:
    difference = W.detach().float() if other is None else W.detach().float() - other.detach().float()
    return float(torch.linalg.vector_norm(difference, dtype=torch.float32)) ** 2

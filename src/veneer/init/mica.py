"""MiCA, minor component adaptation: only A learns, and only where the weight does least. Shapes: I in, O out, R rank.

https://arxiv.org/abs/2604.01694.
"""

from typing import Any

import torch
from torch import Generator

from veneer.init.checks import matrix_of, most_singular_values
from veneer.init.factors import Factors, Weight


def mica(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """A zero; B, which is not trained, the left singular vectors of W's R smallest singular values.

    Raises ConfigError if the weight has fewer singular values than the rank, or values that are not finite.
    """
    most_singular_values(rank, weight, "mica")
    W_OI = matrix_of(weight, "mica")
    U_OK = torch.linalg.svd(W_OI, full_matrices=False).U
    return Factors(W_OI.new_zeros(rank, weight.in_features), U_OK[:, -rank:], frozen=("B",))

"""OLoRA: the adapter starts as the leading part of the weight's QR decomposition. Shapes: I in, O out, R rank.

Büyükakyüz 2024, https://arxiv.org/abs/2406.01775.
"""

from typing import Any

import torch
from torch import Generator

from veneer.init.checks import matrix_of, most_singular_values
from veneer.init.factors import Factors, Weight


def olora(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """B the first R columns of Q, which are orthonormal, and A the first R rows of R, in W = Q R.

    s · B A is taken off the base; the scale divides nothing here (the paper, algorithm 1). Raises ConfigError if the
    rank is above min(O, I), or if the weight holds values that are not finite.
    """
    most_singular_values(rank, weight, "olora")
    Q_OK, R_KI = torch.linalg.qr(matrix_of(weight, "olora"))
    return Factors(R_KI[:rank], Q_OK[:, :rank], subtract=True)

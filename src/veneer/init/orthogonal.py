"""Orthogonal initialisation: A and B both random, their product zero. Shapes: I in, O out, R rank.

https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
"""

from typing import Any

import torch
from torch import Generator

from veneer.errors import ConfigError
from veneer.init.factors import Factors, Weight


def orthogonal(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """A and B on the two halves of one random rotation of the R inner dimensions, so that B A = 0 up to rounding.

    Neither factor is zero, so both learn from the first step. Raises ConfigError for an odd rank.
    """
    if rank % 2:
        raise ConfigError(f"'orthogonal' needs an even rank to halve, not {rank}: set r to {rank + 1}, for example.")
    place = {"device": weight.device if generator is None else generator.device, "dtype": torch.float32}
    if place["device"].type == "meta":  # a shape has no rotation
        return Factors(torch.empty(rank, weight.in_features, **place), torch.empty(weight.out_features, rank, **place))
    Q_RR = torch.linalg.qr(torch.randn(rank, rank, **place, generator=generator)).Q
    for_A, for_B = Q_RR[0::2], Q_RR[1::2]  # (R / 2, R) each
    A_RI = (torch.randn(weight.in_features, rank // 2, **place, generator=generator) @ for_A).T / 10
    B_OR = torch.randn(rank // 2, weight.out_features, **place, generator=generator).T @ for_B / 10
    return Factors(A_RI.contiguous(), B_OR)

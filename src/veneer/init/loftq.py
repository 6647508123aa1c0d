"""LoftQ: a quantised base and factors that make up for what it lost. Shapes: I in, O out, R rank.

Li et al. 2023, https://arxiv.org/abs/2310.08659.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from veneer.config.sub_configs import LoftQConfig
from veneer.functional.svd import balanced_factors
from veneer.init.checks import matrix_of, most_singular_values
from veneer.init.factors import Factors, Weight
from veneer.init.quantisers import QUANTISERS


def loftq(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: LoftQConfig | Mapping[str, Any] | None = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """Quantise what the factors leave, fit the factors to what that loses, `loftq_iter` times; `base` is quantised.

    base + s · B A is as near to W as the rank allows. Raises ConfigError if the weight has fewer singular values than
    the rank, or values that are not finite.
    """
    settings = LoftQConfig.of(options)
    most_singular_values(rank, weight, "loftq")
    W_OI = matrix_of(weight, "loftq")
    quantised = QUANTISERS[settings.loftq_bits]
    base_OI = quantised(W_OI)
    A_RI, B_OR = fit(W_OI - base_OI, rank, scale=scale)
    for _ in range(settings.loftq_iter - 1):
        base_OI = quantised(W_OI - scale * B_OR @ A_RI)
        A_RI, B_OR = fit(W_OI - base_OI, rank, scale=scale)
    return Factors(A_RI, B_OR, base=base_OI)


def fit(rest_OI: Tensor, rank: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(A, B) for which s · B A is the best approximation of the given matrix with the rank (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(rest_OI, full_matrices=False)
    return balanced_factors(U[:, :rank], S[:rank], Vh[:rank], scale=scale)

"""PiSSA: the adapter starts as the weight's principal part. Shapes: I in, O out, R rank.

Meng, Wang and Zhang 2024, https://arxiv.org/abs/2404.02948.
"""

from typing import Any

import torch
from torch import Generator

from veneer.functional.svd import balanced_factors, randomized_svd
from veneer.init.checks import matrix_of, most_singular_values
from veneer.init.factors import Factors, Weight


def pissa(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
    niter: int | None = None,
) -> Factors:
    """s · B A is the best approximation of W with the rank, and is taken off the base.

    niter  None for an exact decomposition; or the number of subspace iterations of a random one, many times faster
           and nearly as good from about 4 on ("pissa_niter_4")

    Raises ConfigError if the weight has fewer singular values than the rank, or values that are not finite.
    """
    most_singular_values(rank, weight, "pissa")
    W_OI = matrix_of(weight, "pissa")
    if niter is None:
        U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    else:
        U, S, Vh = randomized_svd(W_OI, rank, niter=niter, generator=generator)
    A_RI, B_OR = balanced_factors(U[:, :rank], S[:rank], Vh[:rank], scale=scale)
    return Factors(A_RI, B_OR, subtract=True)

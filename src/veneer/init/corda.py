"""CorDA: the adapter starts as the part of the weight that matters most, or least, on given inputs.

Yang et al. 2024, https://arxiv.org/abs/2406.05223. Shapes: I in, O out, R rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from veneer.config.sub_configs import CordaConfig
from veneer.errors import ConfigError
from veneer.functional.svd import balanced_factors
from veneer.init.checks import finite, matrix_of, most_singular_values, shaped
from veneer.init.factors import Factors, Weight

DAMPING = 0.01  # of the mean variance, added to every input's: few samples leave a covariance without an inverse


def corda(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: CordaConfig | Mapping[str, Any] | None = None,
    stats: Tensor | None = None,
    generator: Generator | None = None,
) -> Factors:
    """s · B A = U_r S_r V_rᵀ C⁻¹, in W C = U S Vᵀ with C the covariance of the inputs, and is taken off the base.

    stats  the covariance, of shape (I, I), uncentred, as `covariance.py` measures it
    "ipm" takes the R largest singular values, "kpm" the R smallest. In float64: C is inverted.

    Raises ConfigError if the rank is above min(O, I), or if the weight or the covariance cannot be used.
    """
    if stats is None:
        raise ConfigError("'corda' starts from the inputs of each layer: measure them first and give them as `stats`.")
    settings = CordaConfig.of(options)
    most_singular_values(rank, weight, "corda")
    shaped(stats, (weight.in_features, weight.in_features), "a covariance", "corda")
    W_OI = matrix_of(weight, "corda").double()
    C_II = _damped(finite(stats, "the covariance of its inputs", "corda").to(W_OI))
    U, S, Vh = torch.linalg.svd(W_OI @ C_II, full_matrices=False)
    part = slice(None, rank) if settings.corda_method == "ipm" else slice(len(S) - rank, None)
    Vh_over_C = torch.linalg.solve(C_II, Vh[part], left=False)
    A_RI, B_OR = balanced_factors(U[:, part], S[part], Vh_over_C, scale=scale)
    return Factors(A_RI, B_OR, subtract=True)


def _damped(C_II: Tensor) -> Tensor:
    mean = C_II.diagonal().mean()
    if not mean > 0:
        raise ConfigError("'corda' cannot start: this layer saw no inputs but zeros. Measure on other data.")
    return C_II + DAMPING * mean * torch.eye(len(C_II)).to(C_II)

"""CorDA: the adapter starts as the part of the weight that matters most, or least, on given inputs.

Yang et al. 2024, https://arxiv.org/abs/2406.05223. Shapes: I in, O out, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from veneer.config.sub_configs import CordaConfig
from veneer.errors import ConfigError
from veneer.functional.svd import balanced_factors
from veneer.init.checks import finite, matrix_of, most_singular_values, shaped
from veneer.init.factors import Factors, Weight

DAMPING = 0.01  # of the mean variance, added to every input's: few samples leave a covariance without an inverse
_SAME_WEIGHT = 0.1  # relative; float32, as others compute, is far below, another weight far above


@dataclass(frozen=True)
class CordaParts:
    """The part of W C = U S Vᵀ that a CorDA adapter starts from: S_r of shape (R,), U_r (O, R), and C⁻¹ V_r (I, R)."""

    S_R: Tensor
    U_OR: Tensor
    V_IR: Tensor


def corda(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: CordaConfig | Mapping[str, Any] | None = None,
    stats: Tensor | CordaParts | None = None,
    generator: Generator | None = None,
) -> Factors:
    """s · B A = U_r S_r V_rᵀ C⁻¹, in W C = U S Vᵀ with C the covariance of the inputs, and is taken off the base.

    stats  the covariance, of shape (I, I), uncentred, as `covariance.py` measures it; or the parts themselves
    "ipm" takes the R largest singular values, "kpm" the R smallest. In float64: C is inverted.

    Raises ConfigError if the rank is above min(O, I), or if the weight or what was measured cannot be used.
    """
    if stats is None:
        raise ConfigError("'corda' starts from the inputs of each layer: measure them first and give them as `stats`.")
    if isinstance(stats, CordaParts):
        parts = _checked(stats, weight, rank)
    else:
        parts = decomposed(weight, rank, stats, method=CordaConfig.of(options).corda_method)
    A_RI, B_OR = balanced_factors(parts.U_OR, parts.S_R, parts.V_IR.T, scale=scale)
    return Factors(A_RI, B_OR, subtract=True)


def decomposed(weight: Weight, rank: int, C_II: Tensor, *, method: str) -> CordaParts:
    """The R parts that "ipm" or "kpm" takes, in float64. Raises ConfigError as `corda`."""
    most_singular_values(rank, weight, "corda")
    shaped(C_II, (weight.in_features, weight.in_features), "a covariance", "corda")
    W_OI = matrix_of(weight, "corda").double()
    C_II = _damped(finite(C_II, "the covariance of its inputs", "corda").to(W_OI))
    U, S, Vh = torch.linalg.svd(W_OI @ C_II, full_matrices=False)
    part = slice(None, rank) if method == "ipm" else slice(len(S) - rank, None)
    Vh_over_C = torch.linalg.solve(C_II, Vh[part], left=False)
    return CordaParts(S[part], U[:, part], Vh_over_C.T)


def _checked(parts: CordaParts, weight: Weight, rank: int) -> CordaParts:
    """The parts, if they are of this rank and of this weight: U_rᵀ W = S_r V_rᵀ C⁻¹."""
    shaped(parts.U_OR, (weight.out_features, rank), "left singular vectors", "corda")
    shaped(parts.V_IR, (weight.in_features, rank), "right singular vectors", "corda")
    shaped(parts.S_R, (rank,), "singular values", "corda")
    W_OI = matrix_of(weight, "corda").double()
    U_OR, S_R, V_IR = (finite(X, "what was measured", "corda").to(W_OI) for X in (parts.U_OR, parts.S_R, parts.V_IR))
    expected_RI = U_OR.T @ W_OI
    if (expected_RI - S_R[:, None] * V_IR.T).norm() > _SAME_WEIGHT * expected_RI.norm():
        raise ConfigError("what was measured for 'corda' belongs to other weights: measure it on this model.")
    return CordaParts(S_R, U_OR, V_IR)


def _damped(C_II: Tensor) -> Tensor:
    mean = C_II.diagonal().mean()
    if not mean > 0:
        raise ConfigError("'corda' cannot start: this layer saw no inputs but zeros. Measure on other data.")
    return C_II + DAMPING * mean * torch.eye(len(C_II)).to(C_II)

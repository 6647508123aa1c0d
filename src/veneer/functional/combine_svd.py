"""The best factors of a given rank for one update, by singular value decomposition (Eckart and Young 1936).

Shapes: I in, O out, R rank of what is given, K rank of what is answered.
"""

import math

import torch
from torch import Tensor

from veneer.errors import ConfigError


def truncated(D_OI: Tensor, rank: int, *, driver: str | None = None) -> tuple[Tensor, Tensor]:
    """A = Vᵀ of shape (K, I) and B = U S of shape (O, K), whose product is the matrix of rank K nearest to D.

    A rank above what D can have is filled with zeros.
    """
    U_OK, S_K, Vh_KI = torch.linalg.svd(D_OI, full_matrices=False, driver=driver)
    return filled(Vh_KI[:rank], (U_OK * S_K)[:, :rank], rank)


def truncated_product(A_RI: Tensor, B_OR: Tensor, rank: int, *, driver: str | None = None) -> tuple[Tensor, Tensor]:
    """`truncated(B A, rank)`, without ever making the (O, I) matrix where R is smaller than both.

    With B = Q_B T_B and Aᵀ = Q_A T_A, the decomposition of B A is that of the (R, R) matrix T_B T_Aᵀ, rotated.
    """
    if A_RI.shape[0] >= min(A_RI.shape[1], B_OR.shape[0]):
        return truncated(B_OR @ A_RI, rank, driver=driver)
    Q_OR, T_RR = torch.linalg.qr(B_OR)
    Q_IR, L_RR = torch.linalg.qr(A_RI.T)
    A_KR, B_RK = truncated(T_RR @ L_RR.T, rank, driver=driver)
    return A_KR @ Q_IR.T, Q_OR @ B_RK


def filled(A_KI: Tensor, B_OK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with factors of a higher rank: zeros beyond the rows and columns there are."""
    A_RI = A_KI.new_zeros(rank, A_KI.shape[1])
    B_OR = B_OK.new_zeros(B_OK.shape[0], rank)
    A_RI[: A_KI.shape[0]] = A_KI
    B_OR[:, : B_OK.shape[1]] = B_OK
    return A_RI, B_OR


def clamped(A_KI: Tensor, B_OK: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Both factors cut to ±h, where h is the quantile `level` of all their values.

    Raises ConfigError if h is not positive: nothing would be left.
    """
    high = quantile(torch.cat([B_OK.flatten(), A_KI.flatten()]), level)
    if high <= 0:
        raise ConfigError(
            f"svd_clamp={level:g}: that quantile of the factors is {high:.3g}, and cutting at it would leave nothing. "
            "Use a level near 1, such as 0.99."
        )
    return A_KI.clamp(-high, high), B_OK.clamp(-high, high)


def quantile(values: Tensor, level: float) -> float:
    """The quantile of a vector, interpolated as `torch.quantile` does, which stops at 16 million values."""
    place = level * (len(values) - 1)
    below = math.floor(place)
    low = values.kthvalue(below + 1).values.item()
    high = values.kthvalue(min(below + 2, len(values))).values.item()
    return low + (high - low) * (place - below)

"""A LoRA out of a difference of weights: the factors of low rank nearest to what full training, or another method, did.

Shapes: I in (for a convolution, I k...), O out, R rank.
"""

from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.errors import ConfigError, MergeError


class Extraction(NamedTuple):
    """A of shape (R, I) and B of shape (O, R), of scale 1, and ‖D - B A‖ / ‖D‖ (Frobenius) of these very factors."""

    A: Tensor
    B: Tensor
    error: float

    @property
    def rank(self) -> int:
        """R."""
        return self.A.shape[0]


def check_rank(rank: int | float) -> None:
    """Raise ConfigError unless `rank` is an integer of at least 1, or a fraction above 0 and at most 1."""
    if isinstance(rank, Real) and not isinstance(rank, bool):
        if isinstance(rank, Integral) and rank >= 1:
            return
        if not isinstance(rank, Integral) and 0 < rank <= 1:
            return
    raise ConfigError(
        f"rank={rank!r} must be an integer of at least 1, or a float above 0 and at most 1: "
        "the fraction of the squared singular values to keep (1 means rank one, 1.0 means all)."
    )


def difference(W_tuned: Tensor, W_base: Tensor) -> Tensor:
    """W_tuned - W_base, in at least 32 bits. Raises ConfigError if their shapes differ."""
    if W_tuned.shape != W_base.shape:
        raise ConfigError(
            f"The tuned weight is of shape {tuple(W_tuned.shape)}, the base's {tuple(W_base.shape)}: "
            "a difference needs the very model that was tuned."
        )
    wide = _wide(torch.promote_types(W_tuned.dtype, W_base.dtype))
    return W_tuned.to(wide) - W_base.to(wide)


@torch.no_grad()
def extract(D: Tensor, rank: int | float, *, dtype: torch.dtype | None = None) -> Extraction:
    """The factors B A nearest to a difference D of shape (O, I) or, for a convolution, (O, I, k...).

    rank   an integer: that rank. A float: the lowest rank, at least 1, whose squared singular values sum to at least
           this fraction of all; singular values below the rounding error of D count as zero
    dtype  of the factors; None: D's. Computed in 32 bits at least

    A convolution's factors are of shape (R, I, k...) and (O, R, 1...). `error` counts what the rank leaves out and what
    rounding to `dtype` does; it is 0 for a D of zeros.

    Raises ConfigError for a rank that D cannot have or values that are not finite, MergeError if `dtype` is too narrow.
    """
    check_rank(rank)
    dtype = D.dtype if dtype is None else dtype
    D_OI = D.flatten(1).to(_wide(D.dtype))
    largest = min(D_OI.shape)
    if isinstance(rank, Integral) and rank > largest:
        raise ConfigError(
            f"rank={rank} is more than a difference of shape {tuple(D.shape)} can have: ask for {largest} at most."
        )
    if not D_OI.isfinite().all():
        raise ConfigError("The difference has values that are not finite: look for nan or inf in both weights.")
    U_OK, S_K, Vh_KI = torch.linalg.svd(D_OI, full_matrices=False)
    R = int(rank) if isinstance(rank, Integral) else _rank_of_energy(S_K, float(rank), max(D_OI.shape))
    A_RI = Vh_KI[:R].to(dtype).clone(memory_format=torch.contiguous_format)  # not a view that keeps all of V alive
    B_OR = (U_OK[:, :R] * S_K[:R]).to(dtype).contiguous()
    if not B_OR.isfinite().all():
        raise MergeError(f"The factors do not fit into {dtype}: extract them in float32.")
    missing = torch.addmm(D_OI, B_OR.to(D_OI.dtype), A_RI.to(D_OI.dtype), alpha=-1)
    norm = D_OI.norm()
    error = (missing.norm() / norm).item() if norm > 0 else 0.0
    ones = (1,) * (D.dim() - 2)
    return Extraction(A_RI.reshape(R, *D.shape[1:]), B_OR.reshape(-1, R, *ones), error)


def _rank_of_energy(S_K: Tensor, fraction: float, longest: int) -> int:
    noise = S_K[0] * longest * torch.finfo(S_K.dtype).eps
    energy = torch.where(noise < S_K, S_K, 0.0).cpu().double().square().cumsum(0)
    return int(torch.searchsorted(energy, fraction * energy[-1])) + 1


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

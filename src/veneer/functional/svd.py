"""Singular value decompositions: all of a matrix, or its leading part by random projections.

Shapes: M rows, N columns, K components.
"""

import torch
from torch import Generator, Tensor


def randomized_svd(
    X_MN: Tensor, components: int, *, niter: int, generator: Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading (U_MK, S_K, Vh_KN) by subspace iteration, up to an error that falls with `niter`.

    As `torch.svd_lowrank`, which takes no generator: the same random numbers give the same answer. They are drawn where
    the generator is, so that a seed means the same on any device. K is at most min(M, N).

    Halko, Martinsson and Tropp 2009, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1.
    """
    if X_MN.shape[0] < X_MN.shape[1]:
        U, S_K, Vh = randomized_svd(X_MN.T, components, niter=niter, generator=generator)
        return Vh.T, S_K, U.T
    device = X_MN.device if generator is None else generator.device
    size = (X_MN.shape[1], min(components, X_MN.shape[1]))
    random = torch.randn(size, dtype=X_MN.dtype, device=device, generator=generator).to(X_MN.device)
    Q_MK = torch.linalg.qr(X_MN @ random).Q
    for _ in range(niter):
        Q_NK = torch.linalg.qr(X_MN.T @ Q_MK).Q
        Q_MK = torch.linalg.qr(X_MN @ Q_NK).Q
    U, S_K, Vh_KN = torch.linalg.svd(Q_MK.T @ X_MN, full_matrices=False)
    return Q_MK @ U, S_K, Vh_KN


def balanced_factors(U_MK: Tensor, S_K: Tensor, Vh_KN: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(A_KN, B_MK) with scale · B A = U diag(S) Vh, the singular values shared equally between both."""
    root_K = (S_K / scale).sqrt()
    return root_K[:, None] * Vh_KN, U_MK * root_K


def signs_fixed(Vh_KN: Tensor) -> Tensor:
    """Each row turned so that its largest entry is positive: singular vectors are only given up to a sign."""
    largest = Vh_KN.abs().argmax(dim=1, keepdim=True)
    return Vh_KN * torch.where(Vh_KN.gather(1, largest) < 0, -1.0, 1.0).to(Vh_KN.dtype)

"""A weight and its low-rank updates, summed exactly enough and rounded once, without a temporary of the weight's size.

Shapes: I in, O out, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 16  # numbers of a weight that are summed at once on a CPU, where they stay in the cache
DEVICE_BLOCK = 1 << 24  # and elsewhere, where each step has a cost
FEWEST_ROWS = 64  # but no fewer rows than pay for reading all of A once more


def exact_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that sums with a weight are made in: float64 on a CPU, else float32 or wider."""
    return torch.float64 if weight.device.type == "cpu" else torch.promote_types(weight.dtype, torch.float32)


def add_products(W_OI: Tensor, products: Sequence[tuple[Tensor, Tensor, float]], out_OI: Tensor) -> None:
    """out = W + Σ s · B A for (A, B, s) of `products`, each sum made in `exact_dtype` and rounded once, into `out`.

    A few rows at a time: what it needs besides is one block.
    """
    if W_OI.stride(0) < W_OI.stride(1):  # rows that lie together in memory are worked on together
        turned = [(B_OR.T, A_RI.T, scale) for A_RI, B_OR, scale in products]
        return add_products(W_OI.T, turned, out_OI.T)
    exact = exact_dtype(W_OI)
    products = [(A_RI.to(exact), B_OR.to(exact), scale) for A_RI, B_OR, scale in products]
    rows = max(FEWEST_ROWS, (BLOCK if W_OI.device.type == "cpu" else DEVICE_BLOCK) // max(1, W_OI.shape[1]))
    sums_OI = torch.empty(min(rows, W_OI.shape[0]), W_OI.shape[1], dtype=exact, device=W_OI.device)
    for first in range(0, W_OI.shape[0], rows):
        block = slice(first, min(first + rows, W_OI.shape[0]))
        sums = sums_OI[: block.stop - block.start].copy_(W_OI[block])
        for A_RI, B_OR, scale in products:
            sums.addmm_(B_OR[block], A_RI, alpha=scale)
        out_OI[block] = sums


def stays_finite(W: Tensor, products: Sequence[tuple[Tensor, Tensor, float]]) -> bool:
    """Whether W + Σ s · B A surely has no NaN and no infinity in W's dtype, told without the sums.

    No entry of B A is larger than the largest row of B times the largest column of A. False may be needless.
    """
    if not W.numel():
        return True
    low, high = W.detach().aminmax()
    bound = torch.maximum(-low, high).to(exact_dtype(W))
    for A_RI, B_OR, scale in products:
        column, row = (torch.linalg.vector_norm(M.to(exact_dtype(W)), dim=0).amax() for M in (A_RI, B_OR.T))
        bound = bound + abs(scale) * column * row
    return bool(bound <= torch.finfo(W.dtype).max / 2)

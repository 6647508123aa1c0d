"""Weights and their low-rank updates, summed exactly enough and rounded once, without a temporary of the weights' size.

Shapes: N matrices, I in, O out, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor, float]  # A of shape (N, R, I), B of shape (N, O, R), s: the updates s · B A
BLOCK = 1 << 19  # numbers of the weights that are summed at once on a CPU: 4 MiB, which stay in the cache
DEVICE_BLOCK = 1 << 24  # and elsewhere, where each step has a cost
FEWEST_ROWS = 64  # but no fewer rows than pay for reading all of A once more


def exact_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that sums with a weight are made in: float64 on a CPU, else float32 or wider."""
    return torch.float64 if weight.device.type == "cpu" else torch.promote_types(weight.dtype, torch.float32)


def add_products(W_NOI: Tensor, products: Sequence[Product], out_NOI: Tensor) -> None:
    """out = W + Σ s · B A, each sum made in `exact_dtype` and rounded once, into `out`.

    A few matrices at a time, or a few rows of one: what it needs besides is one block and the factors.
    """
    if W_NOI.stride(1) < W_NOI.stride(2):  # rows that lie together in memory are worked on together
        turned = [(B_NOR.mT, A_NRI.mT, scale) for A_NRI, B_NOR, scale in products]
        return add_products(W_NOI.mT, turned, out_NOI.mT)
    exact, (count, height, width) = exact_dtype(W_NOI), W_NOI.shape
    products = [(A.to(exact).contiguous(), B.to(exact).contiguous(), scale) for A, B, scale in products]
    block = BLOCK if W_NOI.device.type == "cpu" else DEVICE_BLOCK
    matrices, rows = max(1, block // max(1, height * width)), max(FEWEST_ROWS, block // max(1, width))
    sums_NOI = torch.empty(min(matrices, count), min(rows, height), width, dtype=exact, device=W_NOI.device)
    for n in range(0, count, matrices):
        for o in range(0, height, rows):
            W, out = (M[n : n + matrices, o : o + rows] for M in (W_NOI, out_NOI))
            sums = sums_NOI[: W.shape[0], : W.shape[1]].copy_(W)
            for A_NRI, B_NOR, scale in products:
                sums.baddbmm_(B_NOR[n : n + matrices, o : o + rows], A_NRI[n : n + matrices], alpha=scale)
            out.copy_(sums)


def stays_finite(W_NOI: Tensor, products: Sequence[Product]) -> bool:
    """Whether W + Σ s · B A surely has no NaN and no infinity in W's dtype, told without the sums.

    No entry of B A is larger than the largest row of B times the largest column of A. False may be needless.
    """
    if not W_NOI.numel():
        return True
    exact = exact_dtype(W_NOI)
    low, high = W_NOI.detach().aminmax()
    bound = torch.maximum(-low, high).to(exact)
    for A_NRI, B_NOR, scale in products:
        column_N = torch.linalg.vector_norm(A_NRI.to(exact), dim=1).amax(1)  # to: its own dtype would not narrow
        row_N = torch.linalg.vector_norm(B_NOR.to(exact), dim=2).amax(1)
        bound = bound + abs(scale) * (column_N * row_N).amax()
    return bool(bound <= torch.finfo(W_NOI.dtype).max / 2)

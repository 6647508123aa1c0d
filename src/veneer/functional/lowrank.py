"""LoRA's own arithmetic: y = W x + s · B A x (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Shapes: I in, O out, R rank, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scaling(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """The factor s of the update: alpha / r, or alpha / sqrt(r) when rank-stabilised.

    rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
    """
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def update_linear(x: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float | Tensor) -> Tensor:
    """s · B A x, for x of shape (..., I); returns (..., O).

    The scale multiplies the rank-thin product, which costs R instead of O a row.
    """
    return F.linear(F.linear(x, A_RI) * scale, B_OR)


def update_by_group(x_GXI: Tensor, A_GRI: Tensor, B_GOR: Tensor, scale: float | Tensor) -> Tensor:
    """s · B A x for G groups of X inputs, each with an A and a B of its own; returns (G, X, O)."""
    return torch.bmm(torch.bmm(x_GXI, A_GRI.mT) * scale, B_GOR.mT)


def update_embedding(
    ids: Tensor,
    A_RV: Tensor,
    B_OR: Tensor,
    scale: float | Tensor,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """s · B A onehot(ids), for integer ids of shape (...); returns (..., O).

    As in `torch.nn.Embedding`, the column of A that belongs to `padding_idx` gets no gradient, and with
    `scale_grad_by_freq` the gradient of a column is divided by how often its token occurs in `ids`.
    """
    h = F.embedding(ids, A_RV.T, padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return F.linear(h * scale, B_OR)


def delta(A_RI: Tensor, B_OR: Tensor, scale: float | Tensor) -> Tensor:
    """The update as a weight, s · B A, of shape (O, I)."""
    return (B_OR * scale) @ A_RI


def drop_whole_tokens(u: Tensor, p: float) -> Tensor:
    """Dropout on a one-hot input, seen from its output: each token's update of shape (..., O) is kept whole or not."""
    kept = torch.empty(u.shape[:-1], device=u.device, dtype=u.dtype).bernoulli_(1 - p)
    return u * (kept / (1 - p)).unsqueeze(-1)

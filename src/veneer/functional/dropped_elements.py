"""Dropout's dropped elements as a sparse matrix, and the products that need only them. On a CPU.

What p of all elements contribute is computed from these alone, which for a small p is a fraction of a product.
Shapes: T rows, I in, O out, N dropped elements.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 0.15  # the largest p at which these products clearly beat dense ones
FEWEST_ROWS = 256  # below, turning the weight costs more than is saved


class Dropped(NamedTuple):
    """The dropped elements of a (T, I) matrix, row by row, each as an index into the flattened matrix and as a pair.

    places, rows, columns  (N,)
    starts                 (T,), where the elements of each row begin
    """

    places: Tensor
    rows: Tensor
    columns: Tensor
    starts: Tensor


def draw(rows: int, inputs: int, p: float, seed: int) -> Dropped:
    """Each element with probability p, independently of all others; the same ones for the same seed.

    The gaps between successive elements are geometric variables, drawn by inversion: one number an element.
    """
    count, generator = rows * inputs, torch.Generator().manual_seed(seed)
    likely = int(count * p + 6 * math.sqrt(count * p)) + 8
    runs, last = [], -1
    while last < count:
        uniform = torch.rand(likely, dtype=torch.float64, generator=generator)
        # 1 - u is never zero; a gap that reaches past the end may be as short as that takes
        gaps = uniform.neg_().log1p_().mul_(1 / math.log1p(-p)).clamp_(max=count).long().add_(1)
        runs.append(gaps.cumsum_(0).add_(last))
        last = int(runs[-1][-1])
    places = torch.cat(runs) if len(runs) > 1 else runs[0]
    places = places[: int(torch.searchsorted(places, count))]
    if count < 2**31:
        places = places.int()
    row_of = places // inputs
    starts = torch.searchsorted(places, torch.arange(rows, dtype=places.dtype) * inputs, out_int32=count < 2**31)
    return Dropped(places, row_of, places - row_of * inputs, starts)


def product(x_TI: Tensor, dropped: Dropped, W_IO: Tensor) -> Tensor:
    """(x where it is dropped, zero elsewhere) W, of shape (T, O), for a contiguous W."""
    values = x_TI.reshape(-1).index_select(0, dropped.places)
    return F.embedding_bag(dropped.columns, W_IO, dropped.starts, mode="sum", per_sample_weights=values)


def sampled(g_TO: Tensor, W_IO: Tensor, dropped: Dropped) -> Tensor:
    """The dropped elements of g Wᵀ, of shape (N,), for a contiguous W: what autograd does to `product`'s x."""
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return backward(g_TO.contiguous(), W_IO, dropped.columns, dropped.starts, dropped.rows, 0)


def without(x_TI: Tensor, places: Tensor) -> Tensor:
    """A copy of x with zeros at these places."""
    kept = x_TI.clone(memory_format=torch.contiguous_format)
    kept.view(-1).index_fill_(0, places, 0)
    return kept

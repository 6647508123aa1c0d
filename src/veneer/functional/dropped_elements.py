"""Dropout's dropped elements as a sparse matrix, and the products that need only them. On a CPU.

What p of all elements contribute is computed from these alone, which for a small p is a fraction of a product.
Shapes: T rows, I in, O out, N dropped elements.
"""

import math
import warnings
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 0.15  # the largest p at which these products clearly beat dense ones
FEWEST_ROWS = 256  # below, turning the weight costs more than is saved
_TURNED = 2**18  # numbers of the weight that are turned at a time: they stay in a core's cache
_SAMPLED = 2**20  # the same where each of them costs a call for every dropped element


class Dropped(NamedTuple):
    """The dropped elements of a (T, I) matrix, row by row, as torch's sparse CSR tensors name them.

    columns  (N,)
    starts   (T + 1,), where the elements of each row begin, and N
    """

    columns: Tensor
    starts: Tensor

    def places(self, inputs: int) -> Tensor:
        """Each as an index into the flattened matrix."""
        rows = torch.arange(len(self.starts) - 1).mul_(inputs)
        return rows.repeat_interleave(self.starts.diff(), output_size=len(self.columns)).add_(self.columns)


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
    if short := count < 2**31:
        places = places.int()
    starts = torch.searchsorted(places, torch.arange(rows + 1, dtype=places.dtype) * inputs, out_int32=short)
    return Dropped(places % inputs, starts)


def product(values: Tensor, dropped: Dropped, W_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x Wᵀ for an x that has these values where it is dropped, zeros elsewhere: some columns at a time, and which."""
    for some in _slices(W_OI, _TURNED):
        W_Io = W_OI[some].T.contiguous()
        found = F.embedding_bag(
            dropped.columns, W_Io, dropped.starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )
        yield some, found


def sampled(g_TO: Tensor, W_OI: Tensor, dropped: Dropped) -> Tensor:
    """The dropped elements of g W, of shape (N,)."""
    _accept_beta()
    columns, starts = dropped
    size, zeros = (len(g_TO), W_OI.shape[1]), g_TO.new_zeros(len(columns))
    found = torch.sparse_csr_tensor(starts, columns, zeros, size, check_invariants=False)
    for some in _slices(W_OI, _SAMPLED):
        found = torch.sparse.sampled_addmm(found, g_TO[:, some], W_OI[some])
    return found.values()


def without(x_TI: Tensor, places: Tensor) -> Tensor:
    """A copy of x with zeros at these places."""
    kept = x_TI.clone(memory_format=torch.contiguous_format)
    kept.view(-1).index_fill_(0, places, 0)
    return kept


def _slices(W_OI: Tensor, most: int) -> Iterator[slice]:
    """The rows of a weight, so many at a time that they have about so many numbers."""
    rows, columns = W_OI.shape
    step = max(1, most // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


@cache
def _accept_beta() -> None:
    """Once a process torch warns that sparse CSR tensors are in beta: here, where nobody need hear of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)

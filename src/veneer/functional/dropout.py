"""Dropout that is kept as a seed: which elements are dropped is drawn again where a backward pass needs it.

A mask costs a draw and a byte for every element; these places cost what p of them cost. They come for some rows of a
(T, I) matrix at a time, so that nothing of x's size is made, and what is computed of these rows stays in the cache.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CACHED = 2**19  # elements at a time on a CPU: fewer make more calls, more do not stay in a core's cache
_BUFFERED = 2**24  # the same on other devices, where it bounds the memory alone
_BITS = 63  # random bits that torch draws at once
_DRAW_63_BITS = ("cpu", "cuda")  # devices on which it does: on MPS an int64 gets 32


class Block(NamedTuple):
    """The dropped elements of some rows of a matrix.

    rows    which rows
    places  indices into the flattened rows; some come more than once, in any order, and some are the one past the last
            element
    """

    rows: slice
    places: Tensor


def new_seed() -> int:
    """A seed from torch's default generator, so that `torch.manual_seed` and checkpointing repeat what follows."""
    return int(torch.randint(2**62, ()).item())


def room(rows: int, columns: int, device: torch.device | str = "cpu") -> int:
    """Elements of a buffer that holds any block of such a matrix, and its places."""
    return min(rows, _rows_at_once(columns, device)) * columns + 1


def blocks(rows: int, columns: int, p: float, seed: int, device: torch.device | str = "cpu") -> Iterator[Block]:
    """All rows of a matrix, some at a time; each element is dropped with probability p, independently of all others.

    Points are strewn evenly over 2^k indices, as many as a Poisson variable says whose mean is -log(1 - p) for each
    index: so the points of each index are Poisson variables too, independent, and none at all with probability 1 - p
    (Kingman, Poisson Processes, 1993, section 5.1). An index is k random bits; those past the last element are one.
    """
    if not rows * columns:
        return
    step = _rows_at_once(columns, device)
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    sizes = [(part.stop - part.start) * columns for part in parts]
    bits = [max(1, (size - 1).bit_length()) for size in sizes]
    home = device if torch.device(device).type in _DRAW_63_BITS else "cpu"
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor([-math.log1p(-p) * 2**k for k in bits], dtype=torch.float64)
    points = torch.poisson(means, generator=generator).long().tolist()
    if torch.device(home).type != "cpu":
        generator = torch.Generator(home).manual_seed(seed)
    for part, size, k, count in zip(parts, sizes, bits, points, strict=True):
        fields = _BITS // k
        drawn = torch.empty(-(-count // fields), dtype=torch.int64, device=home).random_(generator=generator).to(device)
        shifts = torch.arange(0, fields * k, k, device=device).unsqueeze(1)
        indices = (drawn >> shifts).bitwise_and_(2**k - 1).clamp_(max=size)
        yield Block(part, indices.view(-1)[:count])


def dropped_places(rows: int, columns: int, p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices of all dropped elements of a matrix, into the flattened matrix: some more than once, in any order."""
    found = [torch.empty(0, dtype=torch.int64, device=device)]
    for part, places in blocks(rows, columns, p, seed, device):
        there = places[places < (part.stop - part.start) * columns]
        found.append(there + part.start * columns)
    return torch.cat(found)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x with zeros at the dropped places, not scaled up by 1 / (1 - p): that is cheaper on what is made of it."""
    columns = x.shape[-1]
    places = dropped_places(x.numel() // max(1, columns), columns, p, seed, x.device)
    return x.flatten().index_fill(0, places, 0).view(x.shape)


def _rows_at_once(columns: int, device: torch.device | str) -> int:
    most = _CACHED if torch.device(device).type == "cpu" else _BUFFERED
    return max(1, most // max(1, columns))

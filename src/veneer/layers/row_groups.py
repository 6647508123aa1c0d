"""The rows of a batch by adapter, in groups of one size, so that one batched product serves them all.

Shapes: N rows, T tokens, R rank, K adapters; G groups of S rows, each with one adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from veneer.layers.part import Part


@dataclass(frozen=True, eq=False)
class Groups:
    """Which rows are in which group.

    size      S
    adapter   (G,) which adapter a group has; None if each has its own, in order
    grid      (G · S,) a row of the batch for each place; None if the batch is in this order as it is
    places    where in the grid the rows served are; None if no place is free. What is in a free one, nobody asks for
    rows      the rows served, in the grid's order
    of_row    which adapter each of them has
    """

    size: int
    adapter: Tensor | None
    grid: Tensor | None
    places: Tensor | None
    rows: Tensor
    of_row: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], size: int, device: torch.device) -> "Groups":
        """The rows of the parts in groups of a size; an adapter's last group may have free places."""
        grid: list[int] = []
        adapter: list[int] = []
        places: list[int] = []
        of_row: list[int] = []
        for k, part in enumerate(parts):
            for start in range(0, len(part.numbers), size):
                chunk = part.numbers[start : start + size]
                places += range(len(grid), len(grid) + len(chunk))
                grid += (*chunk, *chunk[:1] * (size - len(chunk)))
                adapter.append(k)
                of_row += [k] * len(chunk)

        def index(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, device=device)

        return cls(
            size,
            None if len(adapter) == len(parts) else index(adapter),
            None if grid == list(range(parts[0].batch)) else index(grid),
            None if len(places) == len(grid) else index(places),
            index([grid[place] for place in places]),
            index(of_row),
        )


def groups_for(parts: tuple[Part, ...], tokens: int, rank: int, device: torch.device) -> Groups:
    """Groups for a layer that sees so many tokens a row; made once for all layers that ask for the same."""
    first = parts[0]
    size = first.shared((parts, tokens, rank), lambda: best_size([len(part.numbers) for part in parts], tokens, rank))
    return first.shared((parts, size, device), lambda: Groups.of(parts, size, device))


def best_size(counts: Sequence[int], tokens: int, rank: int) -> int:
    """The size of groups, given how many rows each adapter has, with the least to read and write.

    A place costs T·(I + O) numbers, free or not, a group R·(I + O) numbers of its factors. So prompts get groups
    without free places, and single tokens few groups.
    """

    def cost(size: int) -> int:
        return sum(-(-count // size) for count in counts) * (size * tokens + rank)

    return min(sorted({*counts, gcd(*counts)}), key=cost)

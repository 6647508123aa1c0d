"""The order in which a run reads its rows: shuffled, with rows of similar length in one step to save padding.

A batch is as wide as its longest row. Rows are drawn at random into windows of a few steps, sorted by length within
each and cut into steps, and the steps are shuffled: each epoch groups anew, each row is read once an epoch, and a step
is still a random sample of a part of the lengths.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

WINDOW = 50  # steps sorted together, as many as in transformers: little padding is left, even of long-tailed lengths
WINDOWS = 4  # a small file still has that many, so that its epochs differ


class ByLength(Sampler[int]):
    """Indices of rows, each once an epoch. The order depends on the seed and the epoch alone, so a run can go on in it.

    lengths      tokens of each row
    rows_a_step  what one optimizer step learns from, all its batches on all devices together
    fillers      so many rows behind the others, of which nothing is learned: they come last in each epoch
    """

    def __init__(self, lengths: Sequence[int], rows_a_step: int, *, seed: int, fillers: int = 0):
        self.lengths, self.rows_a_step, self.seed = lengths[: len(lengths) - fillers], rows_a_step, seed
        self.fillers = fillers
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the beginning of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.fillers

    def __iter__(self) -> Iterator[int]:
        steps = order(self.lengths, self.rows_a_step, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        if self.epoch == 0 and len(steps) > 1:  # so that memory runs out at once if it does
            longest = max(range(len(steps) - 1), key=lambda at: max(self.lengths[row] for row in steps[at]))
            steps.insert(0, steps.pop(longest))
        yield from (row for step in steps for row in step)
        yield from range(len(self.lengths), len(self))


class FillersLast(Sampler[int]):
    """Another sampler's order of the rows, and behind it so many rows of which nothing is learned."""

    def __init__(self, rows: Sampler[int], fillers: int):
        self.rows, self.fillers = rows, fillers

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the beginning of each epoch."""
        rows: Any = self.rows
        rows.set_epoch(epoch)

    def __len__(self) -> int:
        rows: Any = self.rows
        return len(rows) + self.fillers

    def __iter__(self) -> Iterator[int]:
        yield from self.rows
        yield from range(len(self) - self.fillers, len(self))


def order(lengths: Sequence[int], rows_a_step: int, *, generator: torch.Generator) -> list[list[int]]:
    """The rows of each step of one epoch, in order; what is left over makes a short last step.

    >>> order([5, 1, 4, 1, 5], 2, generator=torch.Generator().manual_seed(0))
    [[1, 3], [4, 0], [2]]
    """
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(rows) // rows_a_step
    window = rows_a_step * min(WINDOW, max(1, whole // WINDOWS))
    end = whole * rows_a_step
    steps: list[list[int]] = []
    for start in range(0, end, window):
        near = sorted(rows[start : min(start + window, end)], key=lengths.__getitem__)
        steps += [near[at : at + rows_a_step] for at in range(0, len(near), rows_a_step)]
    steps = [steps[at] for at in torch.randperm(whole, generator=generator).tolist()]
    return steps + ([rows[end:]] if end < len(rows) else [])

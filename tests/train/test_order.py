"""The order of the rows: each once an epoch, at random, with little padding, and the same again when asked."""

import random

import pytest
import torch

from veneer.train.order import WINDOW, ByLength, order


def lengths(rows: int) -> list[int]:
    """Long-tailed, as those of conversations are."""
    return [1 + round(random.Random(row).lognormvariate(5, 1)) for row in range(rows)]


def padded(found: list[int], tokens: list[int], batch: int) -> float:
    """Tokens with padding by tokens without."""
    parts = [found[at : at + batch] for at in range(0, len(found), batch)]
    return sum(max(tokens[row] for row in part) * len(part) for part in parts) / sum(tokens)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 640, 1003])
@pytest.mark.parametrize("rows_a_step", [1, 8])
def test_each_row_is_read_once_an_epoch(rows: int, rows_a_step: int) -> None:
    sampler = ByLength(lengths(rows), rows_a_step, seed=0)
    assert len(sampler) == rows
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(epochs[-1]) == list(range(rows))
        assert list(sampler) == epochs[-1]
    assert rows < 63 or epochs[1] != epochs[2]


def test_the_seed_decides() -> None:
    tokens = lengths(100)
    assert list(ByLength(tokens, 4, seed=1)) == list(ByLength(tokens, 4, seed=1))
    assert list(ByLength(tokens, 4, seed=1)) != list(ByLength(tokens, 4, seed=2))


def test_little_is_padding() -> None:
    tokens = lengths(2000)
    shuffled = random.Random(0).sample(range(2000), 2000)
    assert padded(shuffled, tokens, 8) > 2
    assert padded(list(ByLength(tokens, 8, seed=0)), tokens, 8) < 1.2


def test_smaller_portions_of_a_step_are_sorted_too() -> None:
    tokens = lengths(2000)
    found = list(ByLength(tokens, 8, seed=0))
    assert padded(found, tokens, 2) < padded(found, tokens, 8)


def test_the_longest_step_comes_first_and_only_at_first() -> None:
    tokens = lengths(640)
    sampler = ByLength(tokens, 8, seed=0)
    assert max(tokens) == max(tokens[row] for row in list(sampler)[:8])
    firsts = []
    for epoch in range(1, 4):
        sampler.set_epoch(epoch)
        firsts.append(max(tokens[row] for row in list(sampler)[:8]))
    assert set(firsts) != {max(tokens)}


def test_what_is_left_over_is_drawn_at_random_and_comes_last() -> None:
    tokens = list(range(67))
    steps = [order(tokens, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all([len(step) for step in found] == [8] * 8 + [3] for found in steps)
    assert len({row for found in steps for row in found[-1]}) > 20


def test_rows_meet_others_in_each_epoch() -> None:
    tokens = lengths(8 * WINDOW * 5)
    one, other = (order(tokens, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mates = {row: set(step) for step in one for row in step}
    assert sum(len(mates[step[0]] & set(step)) - 1 for step in other) < len(other)

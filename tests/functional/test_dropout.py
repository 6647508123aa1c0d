"""Dropout by places: every element on its own with probability p, and the same again from the seed."""

import math

import pytest
import torch

from veneer.functional import dropout
from veneer.functional.dropout import blocks, dropped, dropped_places, new_seed, room


@pytest.mark.parametrize("p", [0.02, 0.05, 0.3, 0.5])
def test_each_element_is_dropped_with_probability_p_and_independently(p):
    count, draws = 400, 4000
    hits = torch.zeros(draws, count)
    for seed in range(draws):
        hits[seed, dropped_places(20, count // 20, p, seed)] = 1
    error = math.sqrt(p * (1 - p) / draws)
    assert (hits.mean(0) - p).abs().max() < 5 * error  # each element, the first and the last too
    assert abs(hits.mean() - p) < 4 * error / math.sqrt(count)
    numbers = hits.sum(1)
    assert numbers.var() == pytest.approx(count * p * (1 - p), rel=0.12)  # as of a binomial variable
    together = torch.corrcoef(hits.T[:50])[~torch.eye(50, dtype=torch.bool)]
    assert together[together.isfinite()].abs().max() < 0.15


@pytest.mark.parametrize(("rows", "at_once"), [(1, 2**19), (3, 1)])
def test_a_single_element_is_dropped_as_often(rows, at_once, monkeypatch):
    monkeypatch.setattr(dropout, "_CACHED", at_once)
    hits = sum(len(dropped_places(rows, 1, 0.3, seed).unique()) for seed in range(3000))
    assert hits / (3000 * rows) == pytest.approx(0.3, abs=0.03)


def test_devices_that_draw_fewer_bits_get_places_from_the_cpu(monkeypatch):
    expected = dropped_places(7, 5, 0.3, 2)
    monkeypatch.setattr(dropout, "_DRAW_63_BITS", ())
    assert torch.equal(dropped_places(7, 5, 0.3, 2), expected)


def test_a_seed_gives_the_same_places_again():
    assert torch.equal(dropped_places(10, 100, 0.1, 7), dropped_places(10, 100, 0.1, 7))
    assert not torch.equal(dropped_places(10, 100, 0.1, 7), dropped_places(10, 100, 0.1, 8))


def test_seeds_come_from_the_default_generator():
    torch.manual_seed(3)
    first = [new_seed(), new_seed()]
    torch.manual_seed(3)
    assert first == [new_seed(), new_seed()]
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("rows", "columns"), [(0, 3), (3, 0), (1, 1), (1, 2), (1000, 1000), (3, 2**19 + 1), (910, 576)]
)
def test_places_are_indices(rows, columns):
    places = dropped_places(rows, columns, 0.5, 0)
    assert places.dtype == torch.int64
    assert ((places >= 0) & (places < rows * columns)).all()
    assert len(places.unique()) == pytest.approx(rows * columns / 2, rel=0.02, abs=2)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (1024, 576), (2, 2**20)])
def test_blocks_are_all_rows_in_order_and_have_room(rows, columns):
    found = list(blocks(rows, columns, 0.1, 3))
    assert [row for block in found for row in range(*block.rows.indices(rows))] == list(range(rows))
    for block in found:
        size = (block.rows.stop - block.rows.start) * columns
        assert ((block.places >= 0) & (block.places <= size)).all()
        assert size < room(rows, columns)


def test_a_matrix_of_several_blocks_is_dropped_evenly(monkeypatch):
    monkeypatch.setattr(dropout, "_CACHED", 64)
    count, draws, p = 10 * 30, 4000, 0.1  # blocks of 2 rows, 60 elements in a window of 64
    hits = torch.zeros(draws, count)
    for seed in range(draws):
        hits[seed, dropped_places(10, 30, p, seed)] = 1
    error = math.sqrt(p * (1 - p) / draws)
    assert (hits.mean(0) - p).abs().max() < 5 * error
    assert hits.sum(1).var() == pytest.approx(count * p * (1 - p), rel=0.12)
    assert torch.corrcoef(hits.T)[~torch.eye(count, dtype=torch.bool)].abs().max() < 0.12


def test_dropping_is_differentiable_and_leaves_the_input():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    y = dropped(x, 0.5, 11)
    y.sum().backward()
    assert torch.equal(x, before)
    assert torch.equal(x.grad, (y != 0).double())
    assert torch.equal(y, x * (y != 0))

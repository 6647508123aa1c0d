"""Dropout by places: every element on its own with probability p, and the same again from the seed."""

import math

import pytest
import torch

from veneer.functional.dropout import dropped, dropped_places, new_seed


@pytest.mark.parametrize("p", [0.02, 0.05, 0.3, 0.5])
def test_each_element_is_dropped_with_probability_p_and_independently(p):
    count, draws = 400, 4000
    hits = torch.zeros(draws, count)
    for seed in range(draws):
        hits[seed, dropped_places(count, p, seed)] = 1
    error = math.sqrt(p * (1 - p) / draws)
    assert (hits.mean(0) - p).abs().max() < 5 * error  # each element, the first and the last too
    assert abs(hits.mean() - p) < 4 * error / math.sqrt(count)
    numbers = hits.sum(1)
    assert numbers.var() == pytest.approx(count * p * (1 - p), rel=0.12)  # as of a binomial variable
    together = torch.corrcoef(hits.T[:50])[~torch.eye(50, dtype=torch.bool)]
    assert together[together.isfinite()].abs().max() < 0.15


def test_a_seed_gives_the_same_places_again():
    assert torch.equal(dropped_places(1000, 0.1, 7), dropped_places(1000, 0.1, 7))
    assert not torch.equal(dropped_places(1000, 0.1, 7), dropped_places(1000, 0.1, 8))


def test_seeds_come_from_the_default_generator():
    torch.manual_seed(3)
    first = [new_seed(), new_seed()]
    torch.manual_seed(3)
    assert first == [new_seed(), new_seed()]
    assert first[0] != first[1]


@pytest.mark.parametrize("count", [0, 1, 2, 10**6])
def test_places_are_indices(count):
    places = dropped_places(count, 0.5, 0)
    assert places.dtype == torch.int64
    assert ((places >= 0) & (places < count)).all()


def test_dropping_is_differentiable_and_leaves_the_input():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    y = dropped(x, 0.5, 11)
    y.sum().backward()
    assert torch.equal(x, before)
    assert torch.equal(x.grad, (y != 0).double())
    assert torch.equal(y, x * (y != 0))

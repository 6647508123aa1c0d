import pytest
import torch

from veneer.functional.dropped_elements import draw, product, sampled, without


def mask(rows, inputs, dropped):
    found = torch.zeros(rows * inputs, dtype=torch.bool)
    found[dropped.places.long()] = True
    return found.view(rows, inputs)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (40, 9)], ids=str)
def test_all_ways_to_name_the_elements_agree(shape, p):
    dropped = draw(*shape, p, seed=3)
    expected = mask(*shape, dropped)
    assert (torch.diff(dropped.places) > 0).all()  # each once, in order
    assert torch.equal(torch.stack([dropped.rows, dropped.columns], 1).long(), expected.nonzero())
    lengths = expected.sum(1)
    assert torch.equal(dropped.starts.long(), lengths.cumsum(0) - lengths)


def test_the_same_seed_draws_the_same():
    first, second, other = (draw(30, 8, 0.2, seed).places for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_elements_are_dropped_independently_with_this_probability(p):
    rows, inputs, times = 20, 10, 2000
    masks = torch.stack([mask(rows, inputs, draw(rows, inputs, p, seed)) for seed in range(times)]).flatten(1).double()
    deviation = (p * (1 - p) / times) ** 0.5
    assert (masks.mean(0) - p).abs().max() < 5 * deviation
    assert abs(masks.mean().item() - p) < 5 * deviation / masks.shape[1] ** 0.5
    # neighbours, first and last element: no covariance
    centred = masks - p
    for lag in (1, 2, inputs):
        pairs = centred[:, lag:] * centred[:, :-lag]
        assert abs(pairs.mean().item()) < 5 * p * (1 - p) / pairs.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.9])
def test_products(dtype, p):
    x, W, g = torch.randn(50, 11, dtype=dtype), torch.randn(11, 6, dtype=dtype), torch.randn(50, 6, dtype=dtype)
    dropped = draw(50, 11, p, seed=5)
    there = mask(50, 11, dropped)
    torch.testing.assert_close(product(x, dropped, W), (x * there) @ W)
    torch.testing.assert_close(sampled(g, W, dropped), (g @ W.T)[there])
    assert torch.equal(without(x, dropped.places.long()), x.masked_fill(there, 0))

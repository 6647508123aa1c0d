import subprocess
import sys

import pytest
import torch

from veneer.functional import dropped_elements
from veneer.functional.dropped_elements import draw, product, sampled, without


def mask(rows, inputs, dropped):
    found = torch.zeros(rows * inputs, dtype=torch.bool)
    found[dropped.places(inputs)] = True
    return found.view(rows, inputs)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (40, 9)], ids=str)
def test_all_ways_to_name_the_elements_agree(shape, p):
    dropped = draw(*shape, p, seed=3)
    expected = mask(*shape, dropped)
    assert (torch.diff(dropped.places(shape[1])) > 0).all()  # each once, in order
    assert torch.equal(dropped.columns.long(), expected.nonzero()[:, 1])
    assert torch.equal(dropped.starts.long(), torch.nn.functional.pad(expected.sum(1).cumsum(0), (1, 0)))


def test_the_same_seed_draws_the_same():
    first, second, other = (draw(30, 8, 0.2, seed).places(8) for seed in (1, 1, 2))
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
@pytest.mark.parametrize("at_once", [1, 30, 2**20], ids=["a row", "some rows", "all rows"])
def test_products(dtype, p, at_once, monkeypatch):
    monkeypatch.setattr(dropped_elements, "_TURNED", at_once)
    monkeypatch.setattr(dropped_elements, "_SAMPLED", at_once)
    x, W, g = torch.randn(50, 11, dtype=dtype), torch.randn(6, 11, dtype=dtype), torch.randn(50, 6, dtype=dtype)
    dropped = draw(50, 11, p, seed=5)
    there, places = mask(50, 11, dropped), dropped.places(11)
    parts = product(x.flatten()[places], dropped, W)
    found = torch.full((50, 6), torch.nan, dtype=dtype)
    for some, part in parts:
        found[:, some] = part
    torch.testing.assert_close(found, (x * there) @ W.T)
    torch.testing.assert_close(sampled(g, W, dropped), (g @ W)[there])
    assert torch.equal(without(x, places), x.masked_fill(there, 0))


def test_nobody_hears_that_torch_calls_csr_tensors_beta():
    code = """
import warnings, torch
from veneer.functional.dropped_elements import draw, sampled
warnings.simplefilter("error")
sampled(torch.randn(9, 2), torch.randn(2, 5), draw(9, 5, 0.5, seed=0))
"""
    subprocess.run([sys.executable, "-c", code], check=True)

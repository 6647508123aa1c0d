"""A weight and its updates, summed as if exactly and rounded once, with a block of room besides."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.functional import rounded_sum
from veneer.functional.rounded_sum import add_products, stays_finite


def factors(*, seed, inputs=40, outputs=30, rank=4):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes in memory of its own."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_sum_in_float64_rounded_once(dtype, turned, monkeypatch):
    monkeypatch.setattr(rounded_sum, "BLOCK", 100)
    monkeypatch.setattr(rounded_sum, "FEWEST_ROWS", 7)  # several blocks, the last one smaller
    W = torch.randn(40, 30).to(dtype).T if turned else torch.randn(30, 40).to(dtype)
    products = [(*factors(seed=1), 2.0), (*factors(seed=2, rank=3), -0.5)]
    exact = W.double()
    for A, B, scale in products:
        exact = exact.addmm(B.double(), A.double(), alpha=scale)
    out = torch.empty_like(W)
    add_products(W, products, out)
    if dtype is torch.float64:
        assert torch.allclose(out, exact, rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("turned", [False, True])
def test_no_temporary_has_the_size_of_the_weight(turned, monkeypatch):
    monkeypatch.setattr(rounded_sum, "BLOCK", 2000)
    monkeypatch.setattr(rounded_sum, "FEWEST_ROWS", 1)
    W = torch.randn(400, 300).T if turned else torch.randn(300, 400)
    A, B = factors(seed=1, inputs=400, outputs=300)
    out = torch.empty_like(W)
    with Largest(W, out) as largest:
        add_products(W, [(A, B, 2.0)], out)
    assert 0 < largest.numbers <= 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_surely_stays_finite_does(dtype):
    W, (A, B) = torch.randn(30, 40).to(dtype), factors(seed=1)
    assert stays_finite(W, [(A, B, 2.0)])
    assert stays_finite(W[:0], [])


@pytest.mark.parametrize(
    ("where", "value"),
    [("W", float("nan")), ("A", float("inf")), ("B", float("nan")), ("W", float("-inf")), ("B", 1e5), ("W", 65000.0)],
)
def test_what_may_not_is_doubted(where, value):
    tensors = dict(zip("WAB", (torch.randn(30, 40).half(), *factors(seed=1)), strict=True))
    tensors[where][3, 2] = value
    assert not stays_finite(tensors["W"], [(tensors["A"], tensors["B"], 2.0)])

"""Weights and their updates, summed as if exactly and rounded once, with a block of room besides."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.functional import rounded_sum
from veneer.functional.rounded_sum import add_products, stays_finite


def factors(*, seed, inputs=40, outputs=30, rank=4, matrices=5):
    draw = torch.Generator().manual_seed(seed)
    A_NRI = torch.randn(matrices, rank, inputs, generator=draw)
    return A_NRI, torch.randn(matrices, outputs, rank, generator=draw)


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


def weights(dtype, *, turned, outputs=30, inputs=40, matrices=5):
    """N matrices (O, I); turned, their rows do not lie together in memory."""
    if turned:
        return torch.randn(matrices, inputs, outputs).to(dtype).mT
    return torch.randn(matrices, outputs, inputs).to(dtype)


class Counted(TorchDispatchMode):
    """How many products of stacked matrices are made."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket is torch.ops.aten.baddbmm_
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("block", [100, 2500, 1 << 19])  # some rows of one matrix, two of five matrices, all at once
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_sum_in_float64_rounded_once(dtype, block, turned, monkeypatch):
    monkeypatch.setattr(rounded_sum, "BLOCK", block)
    monkeypatch.setattr(rounded_sum, "FEWEST_ROWS", 7)  # the last block is smaller
    W = weights(dtype, turned=turned)
    products = [(*factors(seed=1), 2.0), (*factors(seed=2, rank=3), -0.5)]
    exact = W.double()
    for A, B, scale in products:
        exact = exact + scale * (B.double() @ A.double())
    out = torch.empty_like(W)
    add_products(W, products, out)
    if dtype is torch.float64:
        assert torch.allclose(out, exact, rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(out, exact.to(dtype))


def test_small_matrices_are_summed_together(monkeypatch):
    monkeypatch.setattr(rounded_sum, "BLOCK", 10 * 30 * 40)
    W, (A, B) = weights(torch.float32, turned=False, matrices=100), factors(seed=1, matrices=100)
    with Counted() as counted:
        add_products(W, [(A, B, 2.0)], torch.empty_like(W))
    assert counted.products == 10


def test_a_weight_without_rows_is_left():
    out = torch.empty(1, 0, 40)
    add_products(torch.empty(1, 0, 40), [(torch.randn(1, 4, 40), torch.randn(1, 0, 4), 1.0)], out)
    assert out.shape == (1, 0, 40)


def test_experts_whose_factors_lie_one_in_another_are_summed_alike(monkeypatch):
    monkeypatch.setattr(rounded_sum, "BLOCK", 2500)
    W, (A, B) = weights(torch.float32, turned=False), factors(seed=1)
    innermost = B.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as adapter files keep B
    out, again = torch.empty_like(W), torch.empty_like(W)
    add_products(W, [(A, B, 2.0)], out)
    add_products(W, [(A, innermost, 2.0)], again)
    assert torch.equal(out, again)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("matrices", "outputs", "inputs"), [(1, 300, 400), (100, 30, 40)])
def test_no_temporary_has_the_size_of_the_weight(matrices, outputs, inputs, turned, monkeypatch):
    monkeypatch.setattr(rounded_sum, "BLOCK", 20_000)
    monkeypatch.setattr(rounded_sum, "FEWEST_ROWS", 1)
    W = weights(torch.float32, turned=turned, matrices=matrices, outputs=outputs, inputs=inputs)
    A, B = factors(seed=1, matrices=matrices, outputs=outputs, inputs=inputs)
    out = torch.empty_like(W)
    with Largest(W, out) as largest:
        add_products(W, [(A, B, 2.0)], out)
    assert 0 < largest.numbers <= 20_000 < W.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_surely_stays_finite_does(dtype):
    W, (A, B) = weights(dtype, turned=False), factors(seed=1)
    assert stays_finite(W, [(A, B, 2.0)])
    assert stays_finite(W[:0], [])


@pytest.mark.parametrize(
    ("where", "value"),
    [("W", float("nan")), ("A", float("inf")), ("B", float("nan")), ("W", float("-inf")), ("B", 1e5), ("W", 65000.0)],
)
def test_what_may_not_is_doubted(where, value):
    tensors = dict(zip("WAB", (weights(torch.float16, turned=False), *factors(seed=1)), strict=True))
    tensors[where][4, 3, 2] = value
    assert not stays_finite(tensors["W"], [(tensors["A"], tensors["B"], 2.0)])


def test_an_expert_is_judged_by_its_own_factors():
    W, (A, B) = weights(torch.float16, turned=False), factors(seed=1)
    A[0] *= 100
    B[1] *= 100  # another one's: no sum comes near the largest float16, and a bound over all would doubt it
    assert stays_finite(W, [(A, B, 2.0)])


def test_factors_wider_than_the_sums_are_taken(monkeypatch):
    """On a GPU sums are made in float32, and an adapter may be in float64."""
    monkeypatch.setattr(rounded_sum, "exact_dtype", lambda weight: torch.float32)
    W, (A, B) = weights(torch.bfloat16, turned=False), (factor.double() for factor in factors(seed=1))
    out = torch.empty_like(W)
    add_products(W, [(A, B, 2.0)], out)
    assert stays_finite(W, [(A, B, 2.0)])
    torch.testing.assert_close(out, (W.double() + 2 * B @ A).bfloat16())

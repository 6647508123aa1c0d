import pytest
import torch
from torch import Tensor

from veneer.functional import dora
from veneer.functional.dora import gain, row_norms, with_gain, with_gain_plainly

IN, OUT, RANK = 5, 4, 3


def random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("scale", [0.0, 0.7, -2.0])
def test_row_norms_are_those_of_the_whole_weight(scale):
    W, A, B = random(OUT, IN, seed=1), random(RANK, IN, seed=2), random(OUT, RANK, seed=3)
    expected = torch.stack([(W[o] + scale * (B @ A)[o]).square().sum().sqrt() for o in range(OUT)])
    torch.testing.assert_close(row_norms(W, A, B, scale), expected.detach())


def test_norms_are_constants_in_the_backward_pass():
    assert not row_norms(random(OUT, IN), random(RANK, IN), random(OUT, RANK), 0.7).requires_grad


def test_gain_is_magnitude_over_norm():
    m, norms = random(OUT, seed=1), torch.tensor([1.0, 2.0, 4.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(gain(m, norms), m / norms)
    assert torch.autograd.gradcheck(lambda m: gain(m, norms), (m,))


def test_a_row_of_zeros_gives_zero_and_not_nan():
    # a pruned row, or the padding of a vocabulary: its magnitude starts at zero too
    m = torch.tensor([0.0, 3.0], requires_grad=True)
    g = gain(m, torch.tensor([0.0, 2.0]))
    assert g.tolist() == [0.0, 1.5]
    g.sum().backward()
    assert m.grad.isfinite().all()


def test_fresh_magnitudes_change_nothing():
    W, A, B = random(OUT, IN), random(RANK, IN), torch.zeros(OUT, RANK, dtype=torch.float64)
    norms = row_norms(W, A, B, 2.0)
    torch.testing.assert_close(gain(norms, norms), torch.ones_like(norms))


def exact_norms(W, A, B, scale):
    W, A, B = (t.detach().double() for t in (W, A, B))
    return torch.linalg.vector_norm(W + scale * B @ A, dim=1)


@pytest.fixture
def small_blocks(monkeypatch):
    """A few rows at a time, the last time fewer."""
    monkeypatch.setattr(dora, "_CACHED", 30)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_low_precision_weights_are_exact(small_blocks, dtype, transposed):
    W, A, B = random(31, 7).to(dtype), random(RANK, 7, seed=1).float(), random(31, RANK, seed=2).float()
    kept = W.T.contiguous().T if transposed else W
    found = row_norms(kept, A, B, 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact_norms(W, A, B, 0.7), rtol=1e-6, atol=0)
    halves = row_norms(kept, A.to(dtype), B.to(dtype), 0.7)
    torch.testing.assert_close(halves.double(), exact_norms(W, A.to(dtype), B.to(dtype), 0.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rest", [0.0, 1e-3, 1.0])
def test_norms_where_the_update_takes_the_weight_away(small_blocks, rest, transposed):
    A, B = random(RANK, 7, seed=1).float(), random(31, RANK, seed=2).float()
    W = rest * random(31, 7) - 2.0 * B.double() @ A.double()
    W = W.detach().float()
    found = row_norms(W.T.contiguous().T if transposed else W, A, B, 2.0)
    # what is left is known as well as the numbers that were added, and no worse
    largest = exact_norms(W, A * 0, B, 1.0).max().item()
    torch.testing.assert_close(found.double(), exact_norms(W, A, B, 2.0), rtol=1e-6, atol=5e-7 * largest)


def test_the_scale_may_be_a_tensor():
    W, A, B = random(OUT, IN), random(RANK, IN), random(OUT, RANK)
    assert torch.equal(row_norms(W, A, B, torch.tensor(0.7, dtype=torch.float64)), row_norms(W, A, B, 0.7))


def test_norms_under_autocast_are_the_same():
    W, A, B = random(OUT, IN).float(), random(RANK, IN).float(), random(OUT, RANK).float()
    expected = row_norms(W, A, B, 0.7)
    with torch.autocast("cpu"):
        assert torch.equal(row_norms(W, A, B, 0.7), expected)


@pytest.mark.parametrize("biased", [False, True])
def test_with_gain_and_its_plain_twin(small_blocks, biased):
    v, g, bias = random(2, 9, OUT), random(OUT, seed=1), random(OUT, seed=2) if biased else None
    torch.testing.assert_close(with_gain(v, g, bias), with_gain_plainly(v, g, bias))
    inputs = (v, g) if bias is None else (v, g, bias)
    cotangent = random(2, 9, OUT, seed=3)
    expected = torch.autograd.grad(with_gain_plainly(v, g, bias), inputs, cotangent)
    for found, plain in zip(torch.autograd.grad(with_gain(v, g, bias), inputs, cotangent), expected, strict=True):
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, True), (False, True, False), (False, False, True)]
)
def test_gradients_of_with_gain(wanted):
    v, g, bias = (
        t.requires_grad_(want) for t, want in zip((random(3, OUT), random(OUT), random(OUT)), wanted, strict=True)
    )
    assert torch.autograd.gradcheck(with_gain, (v, g, bias))
    assert torch.autograd.gradgradcheck(with_gain, (v, g, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_gain_rounds_once(dtype):
    v, bias = random(40, OUT).to(dtype).detach(), random(OUT, seed=2).to(dtype).detach()
    g = (1 + 0.1 * random(OUT, seed=1)).float().detach()
    exact = (g.double() * (v.double() - bias.double()) + bias.double()).float()
    assert torch.equal(with_gain(v.clone().requires_grad_(), g, bias), exact.to(dtype))
    assert torch.equal(with_gain(v.clone(), g, bias), exact.to(dtype))


def test_gradients_of_with_gain_in_low_precision_are_summed_in_float32(small_blocks):
    v, dz = random(4000, OUT).bfloat16().detach().requires_grad_(), random(4000, OUT, seed=3).bfloat16().detach()
    g = random(OUT, seed=1).float().detach().requires_grad_()
    (found,) = torch.autograd.grad(with_gain(v, g, None), [g], dz)
    torch.testing.assert_close(found.double(), (dz.double() * v.double()).sum(0), rtol=1e-5, atol=1e-3)


def test_without_gradients_the_output_takes_the_inputs_place():
    v, g = random(3, OUT).detach(), random(OUT).detach()
    expected = v * g
    assert with_gain(v, g, None).data_ptr() == v.data_ptr()
    torch.testing.assert_close(v, expected)


def test_with_gain_keeps_one_tensor_of_the_outputs_size():
    v, g, bias, kept = random(30, OUT), random(OUT), random(OUT), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with_gain(v, g, bias)
    assert [t.data_ptr() == v.data_ptr() for t in kept if t.numel() > OUT] == [True]


def test_the_output_may_be_changed_in_place():
    v, g = random(3, OUT), random(OUT)
    (expected,) = torch.autograd.grad(with_gain_plainly(v, g, None).sum(), [g])
    z = with_gain(v, g, None)
    (found,) = torch.autograd.grad(z.mul_(1.0).sum(), [g])
    torch.testing.assert_close(found, expected)


def test_norms_can_be_transformed():
    W, A, B = random(OUT, IN), random(RANK, IN), random(3, OUT, RANK)
    found = torch.vmap(lambda B: row_norms(W, A, B, 0.7))(B)
    torch.testing.assert_close(found, torch.stack([row_norms(W, A, one, 0.7) for one in B]))

import pytest
import torch
from torch import Tensor

from veneer.functional.dora import gain, row_norms

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

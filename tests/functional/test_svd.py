"""The decompositions against torch's own."""

import pytest
import torch

from veneer.functional.svd import balanced_factors, randomized_svd, signs_fixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)])
@pytest.mark.parametrize("niter", [0, 2, 5])
def test_a_seed_gives_the_numbers_of_torch_s_svd_lowrank(shape, niter, dtype):
    X = torch.randn(*shape, dtype=dtype)
    torch.manual_seed(4)
    U, S, V = torch.svd_lowrank(X, q=6, niter=niter)
    ours = randomized_svd(X, 6, niter=niter, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(ours[1], S)
    torch.testing.assert_close((ours[0] * ours[1]) @ ours[2], (U * S) @ V.T, rtol=1e-4, atol=1e-4)


def test_without_a_generator_torch_s_own_decides():
    X = torch.randn(20, 30)
    torch.manual_seed(4)
    one = randomized_svd(X, 3, niter=0)
    torch.manual_seed(4)
    assert torch.equal(one[1], randomized_svd(X, 3, niter=0)[1])


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_all_components_are_exact(shape):
    X = torch.randn(*shape, dtype=torch.float64)
    U, S, Vh = randomized_svd(X, 40, niter=1)
    assert S.shape == (20,)
    torch.testing.assert_close(S, torch.linalg.svdvals(X))
    torch.testing.assert_close((U * S) @ Vh, X)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_balanced_factors(scale):
    X = torch.randn(5, 7, dtype=torch.float64)
    A, B = balanced_factors(*torch.linalg.svd(X, full_matrices=False), scale=scale)
    torch.testing.assert_close(scale * B @ A, X)
    torch.testing.assert_close(A @ A.T, B.T @ B)


def test_signs_are_fixed_by_the_largest_entry():
    rows = torch.tensor([[1.0, -3.0, 2.0], [0.5, 4.0, -1.0], [0.0, 0.0, 0.0]])
    fixed = signs_fixed(rows)
    assert torch.equal(fixed, torch.tensor([[-1.0, 3.0, -2.0], [0.5, 4.0, -1.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(signs_fixed(-rows), fixed)

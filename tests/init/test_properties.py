"""The mathematical property that each method is defined by, judged in float64."""

import pytest
import torch

from init.oracle import matrix
from veneer.config.sub_configs import LoftQConfig
from veneer.init import Components, Weight, initialise
from veneer.init.quantisers import QUANTISERS

SHAPES = [(24, 40), (40, 24), (17, 17)]
SCALE = 0.5


def made(name, W, rank, **fields):
    factors = initialise(name, Weight.of(W), rank, scale=SCALE, **fields)
    return factors, factors.A.double(), factors.B.double()


@pytest.mark.parametrize("rank", [1, 5, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_is_the_best_approximation_of_its_rank(shape, rank):
    W = torch.randn(*shape)
    _, A, B = made("pissa", W, rank)
    rest = torch.linalg.svdvals(W.double() - SCALE * B @ A)
    S = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(rest.norm(), S[rank:].norm(), rtol=1e-5, atol=1e-4)  # Eckart and Young
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-4, atol=1e-4)  # balanced


def test_random_projections_come_near_the_best_approximation():
    W = matrix(60, 90, decay=0.97)
    best = torch.linalg.svdvals(W.double())[8:].norm()
    errors = []
    for niter in (1, 4, 16):
        _, A, B = made(f"pissa_niter_{niter}", W, 8, generator=torch.Generator().manual_seed(0))
        errors.append((W.double() - SCALE * B @ A).norm() / best)
    assert errors[0] > errors[1] > errors[2] >= 1 - 1e-6
    assert errors[2] < 1.01


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_leading_part_of_a_qr_decomposition(shape):
    W = torch.randn(*shape)
    _, A, B = made("olora", W, 5)
    torch.testing.assert_close(B.T @ B, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
    assert A.tril(-1).abs().max() == 0
    torch.testing.assert_close((B @ A)[:, :5], W.double()[:, :5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B @ (B.T @ W.double()), B @ A, rtol=1e-5, atol=1e-5)  # W on the space of those columns


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_factors_have_no_product(shape, rank):
    _, A, B = made("orthogonal", torch.randn(*shape), rank, generator=torch.Generator().manual_seed(0))
    assert (B @ A).abs().max() < 1e-7
    assert torch.linalg.matrix_rank(A, rtol=1e-4) == torch.linalg.matrix_rank(B, rtol=1e-4) == rank // 2
    assert A.norm() > 0.1
    assert B.norm() > 0.1


def test_the_entries_of_orthogonal_factors():
    _, A, B = made("orthogonal", torch.zeros(4000, 3000), 8, generator=torch.Generator().manual_seed(0))
    for X in (A, B):
        assert X.square().mean().item() == pytest.approx(0.01 / 2, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_mica_looks_where_the_weight_does_least(shape):
    W = matrix(*shape)
    _, A, B = made("mica", W, 4)
    S = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close((B.T @ W.double()).norm(), S[-4:].norm(), rtol=1e-3, atol=1e-6)
    assert A.abs().max() == 0


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_corda_splits_the_weight_by_what_the_inputs_use(shape, method):
    W, X = matrix(*shape, decay=0.98), torch.randn(300, shape[1]) * torch.linspace(0.2, 2, shape[1])
    C = X.T @ X
    factors, A, B = made("corda", W, 4, stats=C, options={"corda_method": method})
    assert factors.subtract
    C = C.double()
    C += 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
    S = torch.linalg.svdvals(W.double() @ C)
    rest = torch.linalg.svdvals((W.double() - SCALE * B @ A) @ C)
    left = S[4:] if method == "ipm" else S[:-4]
    torch.testing.assert_close(rest.norm(), left.norm(), rtol=1e-4, atol=1e-4)


def test_a_covariance_without_an_inverse_will_do():
    x = torch.randn(2, 20)
    _, A, B = made("corda", matrix(12, 20), 4, stats=x.T @ x)
    assert torch.isfinite(B @ A).all()


def test_eva_s_rows_are_the_components():
    vectors = torch.linalg.qr(torch.randn(20, 6)).Q.T
    S = torch.tensor([9.0, 4.0, 1.0, 0.5, 0.2, 0.1])
    _, A, B = made("eva", matrix(12, 20), 3, stats=Components(vectors, S))
    torch.testing.assert_close(A.float(), vectors[:3], rtol=0, atol=0)
    assert B.abs().max() == 0
    _, A, _ = made("eva", matrix(12, 20), 3, stats=Components(vectors, S), options={"whiten": True})
    torch.testing.assert_close(A.norm(dim=1).float(), 1 / S[:3].sqrt())


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga_spans_the_gradient_s_leading_spaces(direction):
    W, G = matrix(24, 40), matrix(24, 40, seed=1)
    _, A, B = made("lora_ga", W, 3, stats=G, options={"direction": direction, "scale": "unit"})
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    rows = {"ArBr": [1, 3, 5], "A2rBr": [3, 4, 5], "ArB2r": [0, 1, 2]}[direction]
    columns = {"ArBr": [0, 2, 4], "A2rBr": [0, 1, 2], "ArB2r": [3, 4, 5]}[direction]
    torch.testing.assert_close((A * Vh[rows]).sum(1).abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close((B * U[:, columns]).sum(0).abs(), S[columns], rtol=1e-3, atol=1e-4)


def test_lora_ga_as_large_as_the_weight():
    W, G = 3 * matrix(24, 40), matrix(24, 40, seed=1)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    thin = (U[:, :3] * S[:3]) @ Vh[:3]  # where R random projections see all of the weight
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        _, _, B = made("lora_ga", thin, 3, stats=G, options={"scale": "weight_svd"}, generator=generator)
        assert B[:, 0].norm().item() == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_loftq_makes_up_for_what_quantisation_loses(shape, bits):
    W = torch.randn(*shape)
    before = None
    for iterations in (1, 2, 3):
        factors, A, B = made("loftq", W, 6, options=LoftQConfig(loftq_bits=bits, loftq_iter=iterations))
        rest = W - factors.base.double()
        best = torch.linalg.svdvals(rest)[6:].norm()
        torch.testing.assert_close((rest - SCALE * B @ A).norm(), best, rtol=1e-4, atol=1e-5)
        assert best < rest.norm()
        left = W if before is None else W - SCALE * before.B @ before.A
        torch.testing.assert_close(factors.base, QUANTISERS[bits](left), rtol=1e-4, atol=1e-4)
        before = factors

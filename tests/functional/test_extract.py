"""Extraction of a LoRA from a difference, against PEFT's convert_to_lora and the theorem of Eckart and Young."""

import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from veneer.errors import ConfigError, MergeError
from veneer.functional.extract import check_rank, difference, extract


def random(*shape, seed=0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_singular_values(values, out=8, features=10) -> Tensor:
    U, _ = torch.linalg.qr(random(out, len(values), seed=1))
    V, _ = torch.linalg.qr(random(features, len(values), seed=2))
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.T


@pytest.mark.parametrize("rank", [1, 4, 8, 0.3, 0.9, 0.99, 1.0])
def test_equals_peft(rank):
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(10, 8)), peft.LoHaConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, tensors = peft.convert_to_lora(model, rank=rank)
    delta = model.base_model.model[0].get_delta_weight("default").detach()
    ours = extract(delta, rank)
    A, B = tensors["base_model.model.0.lora_A.weight"], tensors["base_model.model.0.lora_B.weight"]
    assert ours.rank == (rank if isinstance(rank, int) else config.rank_pattern.get("0", config.r))
    assert (ours.A.shape, ours.B.shape) == (A.shape, B.shape)
    torch.testing.assert_close(ours.B @ ours.A, B @ A, rtol=1e-5, atol=1e-5)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
def test_no_factors_of_that_rank_are_nearer(out, features, rank, seed):
    D, rank = random(out, features, seed=seed), min(rank, out, features)
    result = extract(D, rank)
    S = torch.linalg.svdvals(D)
    assert (result.A.shape, result.B.shape) == ((rank, features), (out, rank))
    assert result.error == pytest.approx((S[rank:].square().sum() / S.square().sum()).sqrt().item(), abs=1e-12)
    assert (D - result.B @ result.A).norm() / D.norm() == pytest.approx(result.error, abs=1e-14)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(0.01, 1), st.integers(0, 2**31))
def test_a_fraction_asks_for_the_lowest_rank_that_keeps_it(out, features, fraction, seed):
    D = random(out, features, seed=seed)
    result = extract(D, fraction)
    assert 1 - result.error**2 >= fraction - 1e-12
    if result.rank > 1:
        assert 1 - extract(D, result.rank - 1).error ** 2 < fraction


@pytest.mark.parametrize(
    ("fraction", "rank"), [(0.5, 1), (0.69, 1), (0.71, 2), (0.9, 2), (0.96, 3), (0.995, 4), (1.0, 4)]
)
def test_fractions_by_hand(fraction, rank):
    # squares 70, 25, 4, 1: shares 0.70, 0.95, 0.99, 1
    D = with_singular_values([70**0.5, 5.0, 2.0, 1.0])
    assert extract(D, fraction).rank == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_of_a_difference_of_low_rank_is_that_rank(dtype):
    """Rounding makes every singular value positive; what is below it is not counted."""
    D = (random(40, 3, seed=1) @ random(3, 50, seed=2)).to(dtype)
    result = extract(D, 1.0)
    assert result.rank == 3
    assert result.error < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rank", [1, 3, 0.5, 1.0])
def test_no_difference_gives_factors_of_zero(rank):
    result = extract(torch.zeros(4, 5), rank)
    assert result.rank == (rank if isinstance(rank, int) else 1)
    assert result.error == 0
    assert torch.equal(result.B @ result.A, torch.zeros(4, 5))


def test_a_convolution_keeps_its_kernel_in_a():
    D = random(6, 4, 3, 2)
    result = extract(D, 6)
    assert (result.A.shape, result.B.shape) == ((6, 4, 3, 2), (6, 6, 1, 1))
    back = nn.functional.conv2d(result.A.transpose(0, 1), result.B).transpose(0, 1)
    torch.testing.assert_close(back, D)


def test_the_error_counts_rounding_to_the_dtype():
    D = with_singular_values([4.0, 2.0]).float()
    exact, rounded = extract(D, 2), extract(D, 2, dtype=torch.bfloat16)
    assert (rounded.A.dtype, rounded.B.dtype) == (torch.bfloat16, torch.bfloat16)
    assert exact.error < 1e-6 < 1e-4 < rounded.error < 1e-2
    product = rounded.B.double() @ rounded.A.double()
    assert rounded.error == pytest.approx(((D.double() - product).norm() / D.double().norm()).item(), rel=1e-4)


def test_a_difference_is_not_rounded_to_half_precision():
    base = random(6, 5).to(torch.bfloat16)
    tuned = (base + random(6, 5, seed=1) / 8).to(torch.bfloat16)
    D = difference(tuned, base)
    assert D.dtype == torch.float32
    assert torch.equal(D.double(), tuned.double() - base.double())
    assert not torch.equal(D, (tuned - base).float())
    assert extract(D, 5).error < 1e-6


def test_the_factors_own_their_memory_and_need_no_gradient():
    D = nn.Parameter(random(6, 5))
    result = extract(D, 2)
    for t in (result.A, result.B):
        assert not t.requires_grad
        assert t.is_contiguous()
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


@pytest.mark.parametrize("rank", [0, -1, True, False, 0.0, -0.5, 1.5, 8.0, float("nan"), "4", None])
def test_ranks_that_cannot_be_meant(rank):
    with pytest.raises(ConfigError, match="must be an integer of at least 1, or a float above 0 and at most 1"):
        check_rank(rank)
    with pytest.raises(ConfigError):
        extract(random(4, 5), rank)


def test_a_rank_that_the_difference_cannot_have():
    with pytest.raises(ConfigError, match=r"rank=5 is more than .* \(4, 6\) can have: ask for 4 at most"):
        extract(random(4, 6), 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    D = random(4, 6)
    D[1, 2] = value
    with pytest.raises(ConfigError, match="not finite"):
        extract(D, 2)


def test_weights_of_two_shapes():
    with pytest.raises(ConfigError, match=r"shape \(4, 6\), the base's \(4, 5\)"):
        difference(random(4, 6), random(4, 5))


def test_factors_that_do_not_fit_into_half_precision():
    with pytest.raises(MergeError, match="torch.float16: extract them in float32"):
        extract(torch.full((4, 4), 5e4), 1, dtype=torch.float16)

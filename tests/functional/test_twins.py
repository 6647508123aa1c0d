"""Each update on activations and the same update in the weight, on any small layer, in float64."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veneer.functional.dora import gain, row_norms, with_gain
from veneer.functional.dora_dropout import dora_dropped, dora_dropped_plainly
from veneer.functional.lowrank import delta, update_embedding, update_linear

SIZE = st.integers(1, 6)
SCALE = st.floats(-8, 8, allow_subnormal=False)
LEADING = st.lists(st.integers(0, 3), max_size=3)
thousand = settings(max_examples=1000, deadline=None, derandomize=True)


def numbers(seed: int):
    """A source of float64 tensors of any shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@thousand
@given(LEADING, SIZE, SIZE, SIZE, SCALE, st.integers(0, 2**31))
def test_a_linear_update_is_its_delta_in_the_weight(leading, features, out, rank, scale, seed):
    draw = numbers(seed)
    x, W, bias, A, B = draw(*leading, features), draw(out, features), draw(out), draw(rank, features), draw(out, rank)
    near(F.linear(x, W, bias) + update_linear(x, A, B, scale), F.linear(x, W + delta(A, B, scale), bias))


@thousand
@given(LEADING, SIZE, SIZE, SIZE, SCALE, st.integers(0, 2**31))
def test_gradients_of_a_linear_update_are_those_of_its_delta(leading, features, out, rank, scale, seed):
    draw = numbers(seed)
    x, W, A, B = draw(*leading, features), draw(out, features), draw(rank, features), draw(out, rank)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    g = draw(*leading, out)
    apart = torch.autograd.grad(F.linear(x, W) + update_linear(x, A, B, scale), leaves, g)
    merged = torch.autograd.grad(F.linear(x, W + delta(A, B, scale)), leaves, g)
    for one, other in zip(apart, merged, strict=True):
        near(one, other)


@thousand
@given(LEADING, SIZE, SIZE, SIZE, SCALE, st.integers(0, 2**31))
def test_dora_on_the_output_is_dora_in_the_weight(leading, features, out, rank, scale, seed):
    draw = numbers(seed)
    x, W, bias = draw(*leading, features), draw(out, features), draw(out)
    A, B, m = draw(rank, features), draw(out, rank), draw(out)
    g = gain(m, row_norms(W, A, B, scale))
    y = F.linear(x, W, bias)
    apart = y + (g - 1) * (y - bias) + g * update_linear(x, A, B, scale)
    near(with_gain(y + update_linear(x, A, B, scale), g, bias), apart)
    V = W + scale * B @ A
    near(apart, F.linear(x, m[:, None] * V / V.norm(dim=1, keepdim=True), bias))


@thousand
@given(LEADING, SIZE, SIZE, SIZE, SCALE, st.floats(1e-6, 0.9), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_dora_by_its_dropped_elements_is_dora_by_a_mask(leading, features, out, rank, scale, p, biased, sparse, seed):
    draw = numbers(seed)
    x, W, bias = draw(*leading, features), draw(out, features), draw(out) if biased else None
    A, B, g = draw(rank, features), draw(out, rank), draw(out)
    leaves = [t.requires_grad_() for t in (x, bias, A, B, g) if t is not None]
    found = dora_dropped(x, W, bias, A, B, g, scale=scale, p=p, seed=seed, sparse=sparse)
    expected = dora_dropped_plainly(x, bias, A, B, g, W, scale, p, seed, sparse)
    near(found * (1 - p), expected * (1 - p))
    cotangent = draw(*leading, out) * (1 - p)
    ours, theirs = (torch.autograd.grad(z, leaves, cotangent) for z in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        near(one * (1 - p), other * (1 - p))


@thousand
@given(SIZE, SIZE, SIZE, SCALE, st.integers(0, 2**31))
def test_every_row_of_a_dora_weight_has_its_magnitude_as_norm(features, out, rank, scale, seed):
    draw = numbers(seed)
    W, A, B, m = draw(out, features), draw(rank, features), draw(out, rank), draw(out)
    merged = gain(m, row_norms(W, A, B, scale))[:, None] * (W + delta(A, B, scale))
    near(merged.norm(dim=1), m.abs())


@thousand
@given(st.data(), SIZE, SIZE, SIZE, SCALE, st.booleans(), st.integers(0, 2**31))
def test_an_embedding_update_is_the_update_of_one_hot_rows(data, vocabulary, out, rank, scale, padded, seed):
    draw, shape = numbers(seed), data.draw(LEADING)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    W, A, B = draw(vocabulary, out), draw(rank, vocabulary), draw(out, rank)
    padding_idx = vocabulary - 1 if padded else None
    one_hot = F.one_hot(ids, vocabulary).double()
    update = update_embedding(ids, A, B, scale, padding_idx=padding_idx)
    near(update, scale * one_hot @ A.T @ B.T)
    near(F.embedding(ids, W) + update, F.embedding(ids, W + delta(A, B, scale).T))

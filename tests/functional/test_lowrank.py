import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from veneer.functional.lowrank import (
    delta,
    drop_whole_tokens,
    scaling,
    update_by_group,
    update_embedding,
    update_linear,
)

IN, OUT, RANK, VOCAB = 5, 4, 3, 7


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("alpha", "rank", "rslora", "expected"),
    [(16, 8, False, 2.0), (8, 8, False, 1.0), (1, 3, False, 1 / 3), (16, 4, True, 8.0), (3, 2, True, 3 / math.sqrt(2))],
)
def test_scaling(alpha, rank, rslora, expected):
    assert scaling(alpha, rank, rslora=rslora) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_update_linear_is_the_plain_formula(leading):
    x, A, B = random(*leading, IN, seed=1), random(RANK, IN, seed=2), random(OUT, RANK, seed=3)
    expected = 0.7 * (B @ A @ x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(update_linear(x, A, B, 0.7), expected)


def test_update_by_group_is_update_linear_for_each():
    x, A, B = random(3, 2, IN, seed=1), random(3, RANK, IN, seed=2), random(3, OUT, RANK, seed=3)
    expected = torch.stack([update_linear(*one, 0.7) for one in zip(x, A, B, strict=True)])
    torch.testing.assert_close(update_by_group(x, A, B, 0.7), expected)


def test_gradients_of_update_linear():
    assert gradcheck(
        lambda x, A, B: update_linear(x, A, B, 0.7), (random(2, 3, IN), random(RANK, IN), random(OUT, RANK))
    )


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_update_embedding_is_the_update_of_one_hot_rows(padding_idx):
    ids = torch.tensor([[0, 2, 6], [3, 3, 1]])
    A, B = random(RANK, VOCAB, seed=1), random(OUT, RANK, seed=2)
    one_hot = nn.functional.one_hot(ids, VOCAB).double()
    expected = update_linear(one_hot, A, B, 0.7)
    torch.testing.assert_close(update_embedding(ids, A, B, 0.7, padding_idx=padding_idx), expected)


def test_gradients_of_update_embedding():
    ids = torch.tensor([[0, 2, 6], [3, 3, 1]])
    assert gradcheck(lambda A, B: update_embedding(ids, A, B, 0.7), (random(RANK, VOCAB), random(OUT, RANK)))


def test_the_padding_row_gets_no_gradient():
    A, B = random(RANK, VOCAB), random(OUT, RANK)
    update_embedding(torch.tensor([1, 2]), A, B, 1.0, padding_idx=2).sum().backward()
    assert A.grad[:, 2].abs().sum() == 0
    assert A.grad[:, 1].abs().sum() > 0


def test_delta_is_what_update_multiplies_by():
    x, A, B = random(6, IN, seed=1), random(RANK, IN, seed=2), random(OUT, RANK, seed=3)
    torch.testing.assert_close(x @ delta(A, B, 0.7).T, update_linear(x, A, B, 0.7))
    assert delta(A, B, 0.7).shape == (OUT, IN)


def test_a_token_is_dropped_whole_or_kept_and_scaled_up():
    torch.manual_seed(0)
    u = torch.ones(40, 50, 6)
    dropped = drop_whole_tokens(u, 0.25)
    assert (dropped == dropped[..., :1]).all()
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped[..., 0] == 0).float().mean() == pytest.approx(0.25, abs=0.03)

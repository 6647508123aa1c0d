"""Adapters on parts of a parameter against the one that they become, by the plain formula in float64."""

import pytest
import torch
from torch.testing import assert_close

from veneer.layers.kinds.parameter import Stack
from veneer.model.renamed.former_names import Place
from veneer.model.renamed.pieces import FACTOR_A, FACTOR_B, MAGNITUDE, Joined, Piece, whole_weight

E, ROWS, IN = 3, 4, 5


def pieces(parts, ranks, alphas, rslora):
    """Random factors of the adapters that (matrix, part) have; rank 0 is none."""
    generator = torch.Generator().manual_seed(0)
    found, tensors = [], {}
    for index, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        if rank:
            place, path = Place("stack", index // parts, index % parts, parts), f"x.{index}"
            found.append(Piece(path, place, rank, alpha, alpha / (rank**0.5 if rslora else rank)))
            tensors[path + FACTOR_A] = torch.randn(rank, IN, generator=generator, dtype=torch.float64)
            tensors[path + FACTOR_B] = torch.randn(ROWS, rank, generator=generator, dtype=torch.float64)
    return found, tensors


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "alphas", "rank"),
    [
        ([2] * 6, [6] * 6, 4),
        ([2, 0] * 3, [6] * 6, 2),
        ([0, 3] * 3, [6] * 6, 3),
        ([2, 1, 0, 3, 1, 0], [6, 5, 4, 3, 2, 1], 5),
        ([0, 0, 0, 0, 0, 2], [7] * 6, 2),
    ],
)
def test_the_update_is_the_same(ranks, alphas, rank, rslora):
    found, tensors = pieces(2, ranks, alphas, rslora)
    stack = Stack(E, 2 * ROWS, IN)
    joined = Joined(tuple(found), stack, rslora)
    assert joined.rank == rank
    assert joined.problems({key: tuple(value.shape) for key, value in tensors.items()}, dora=False) == []
    expected = torch.zeros(E, 2 * ROWS, IN, dtype=torch.float64)
    for piece in found:
        first = piece.place.part * ROWS
        BA = tensors[piece.path + FACTOR_B] @ tensors[piece.path + FACTOR_A]
        expected[piece.place.matrix, first : first + ROWS] += piece.scale * BA
    made = joined.factors(tensors)
    scale = joined.alpha / (rank**0.5 if rslora else rank)
    assert_close(stack.delta(made[FACTOR_A], made[FACTOR_B], scale, expected.shape), expected)


def test_equal_parts_get_peft_s_numbers():
    found, _ = pieces(2, [2] * 6, [6] * 6, False)
    joined = Joined(tuple(found), Stack(E, 2 * ROWS, IN), False)
    assert (joined.rank, joined.alpha, type(joined.alpha)) == (4, 12, int)


def test_parts_of_one_matrix():
    """Several layers that are one now, as q, k and v may be."""
    tensors = {f"{i}{FACTOR_A}": torch.randn(2, IN) for i in range(3)}
    tensors |= {f"{i}{FACTOR_B}": torch.randn(ROWS, 2) for i in range(3)}
    found = tuple(Piece(str(i), Place("qkv.weight", None, i, 3), 2, 2, 1.0) for i in range(3))
    joined = Joined(found, Stack(1, 3 * ROWS, IN), False)
    made = joined.factors(tensors)
    expected = torch.cat([tensors[f"{i}{FACTOR_B}"] @ tensors[f"{i}{FACTOR_A}"] for i in range(3)])
    assert_close(made[FACTOR_B] @ made[FACTOR_A] * joined.alpha / joined.rank, expected)


def test_magnitudes_lie_row_by_row():
    found, tensors = pieces(2, [1] * 6, [1] * 6, False)
    tensors |= {piece.path + MAGNITUDE: torch.full((ROWS,), float(i)) for i, piece in enumerate(found)}
    made = Joined(tuple(found), Stack(E, 2 * ROWS, IN), False).factors(tensors)
    assert made[MAGNITUDE].tolist() == [float(i) for i in range(6) for _ in range(ROWS)]


def test_weights_trained_in_full():
    gate, up = torch.randn(E, ROWS, IN), torch.randn(E, ROWS, IN)
    both = {(e, part): one[e] for part, one in enumerate((gate, up)) for e in range(E)}
    assert torch.equal(whole_weight(both), torch.cat([gate, up], dim=1))
    assert torch.equal(whole_weight({(None, 1): up[0], (None, 0): gate[0]}), torch.cat([gate[0], up[0]]))

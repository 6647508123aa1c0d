"""Rows of a batch in groups of one size."""

import pytest
import torch

from veneer.layers.part import parts_of
from veneer.layers.row_groups import Groups, best_size, groups_for

CPU = torch.device("cpu")


def parts(names):
    return tuple(parts_of(names).values())


def groups(names, size: int) -> Groups:
    return Groups.of(parts(names), size, CPU)


def test_a_batch_in_order_stays_as_it_is():
    found = groups("aabbcc", 2)
    assert (found.adapter, found.grid, found.places) == (None, None, None)
    assert found.rows.tolist() == list(range(6))
    assert found.of_row.tolist() == [0, 0, 1, 1, 2, 2]


def test_every_row_has_a_place_and_free_ones_are_known():
    found = groups(["b", None, "a", "a", "a", "b", "a"], 3)
    assert found.adapter.tolist() == [0, 1, 1]
    assert found.grid.tolist() == [0, 5, 0, 2, 3, 4, 6, 6, 6]
    assert found.places.tolist() == [0, 1, 3, 4, 5, 6]
    assert found.rows.tolist() == [0, 5, 2, 3, 4, 6]
    assert found.of_row.tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("counts", "tokens", "rank", "size"),
    [
        ([4, 4, 4], 1, 8, 4),
        ([12, 4, 4], 100, 8, 4),  # five groups without a free place
        ([12, 4, 4], 1, 100, 12),  # three groups: free places cost little
        ([13, 1, 1, 1], 100, 8, 1),
        ([13, 1, 1, 1], 1, 8, 13),
        ([5, 3], 1, 16, 5),
    ],
)
def test_the_size_with_the_least_to_read(counts, tokens, rank, size):
    assert best_size(counts, tokens, rank) == size


def test_prompts_get_no_free_places():
    for names in ("aabbb", "abcabcdd", "aaaaaab", ["a", None, "b", "b"]):
        assert groups_for(parts(names), 512, 16, CPU).places is None


def test_made_once_for_all_layers():
    some = parts("aab")
    one = groups_for(some, 4, 8, CPU)
    assert groups_for(some, 4, 8, CPU) is one
    some[0].forget()
    assert groups_for(some, 4, 8, CPU) is not one

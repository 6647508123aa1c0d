"""A part of a batch: its rows, and which of their tokens."""

import pytest
import torch

from veneer.errors import AttachError
from veneer.layers.part import Part, parts_of

ROWS = ["a", "b", None, "a"]


@pytest.mark.parametrize("times", [1, 3])
def test_each_row_gets_its_own_update(times):
    x, y = torch.randn(4 * times, 5), torch.randn(4 * times, 5)
    updates = {"a": lambda x, y: y + x, "b": lambda x, y: y * x}
    found = y
    for name, part in parts_of(ROWS).items():
        found = part.through(updates[name], x, found)
    for row, name in enumerate(ROWS):
        for i in range(row * times, (row + 1) * times):
            expected = y[i] if name is None else updates[name](x[i], y[i])
            assert torch.equal(found[i], expected)


def test_a_part_of_the_tokens():
    x, y = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    part = Part(2, tokens=mask)
    found = part.through(lambda x, y: y + x, x, y)
    assert torch.equal(found, torch.where(mask.unsqueeze(-1), y + x, y))
    flat = part.through(lambda x, y: y + x, x.flatten(0, 1), y.flatten(0, 1))
    assert torch.equal(flat, found.flatten(0, 1))
    beams = part.through(lambda x, y: y + x, x.repeat_interleave(2, 0), y.repeat_interleave(2, 0))
    assert torch.equal(beams, found.repeat_interleave(2, 0))


def test_a_batch_of_another_size_is_refused():
    part = parts_of(ROWS)["a"]
    with pytest.raises(AttachError, match="got 6 rows where the batch has 4"):
        part.through(lambda x, y: y, torch.zeros(6, 2), torch.zeros(6, 2))
    with pytest.raises(AttachError, match="on which of them the adapter acts cannot be told"):
        Part(2, tokens=torch.ones(2, 3, dtype=torch.bool)).through(lambda x, y: y, torch.zeros(2, 2), torch.zeros(2, 2))


def test_tokens_of_some_rows():
    tokens = torch.tensor([[True, True, True], [False, False, True]])
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found = Part(2, torch.tensor([1]), tokens).through(lambda x, y: y + x, x, y)
    expected = y.clone()
    expected[1, 2] += x[1, 2]
    assert torch.equal(found, expected)


def test_an_input_without_rows_or_with_more_tokens_is_refused():
    with pytest.raises(AttachError, match="got 0 rows"):
        Part(2).check(torch.zeros(0, 3))
    x = torch.zeros(2, 4, 3)
    with pytest.raises(AttachError, match="rows have 3 tokens"):
        Part(2, None, torch.ones(2, 3, dtype=torch.bool)).through(lambda x, y: y, x, x)


def test_what_parts_share_is_made_once_for_each_set_of_them():
    a, b, c = Part(2), Part(2), Part(2)
    made = [a.shared(parts, object) for parts in ((a, b), (a, c), (a, b))]
    assert made[0] is made[2] is not made[1]
    a.forget()
    assert a.shared((a, b), object) is not made[0]

"""One pass over many tensors finds those that are broken, and no others."""

import pytest
import torch

from veneer.functional.finite import all_finite, not_finite

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_broken_tensors_are_named_in_order(dtype):
    values = {
        "b": [1.0, NAN],
        "fine": [1.0, 2.0],
        "a": [INFINITY, -INFINITY, 1.0],
        "empty": [],
        "c": [-INFINITY],
    }
    assert not_finite({name: torch.tensor(value, dtype=dtype) for name, value in values.items()}) == ["b", "a", "c"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_too_large_is_no_infinity(dtype):
    assert all_finite(torch.full((5,), torch.finfo(dtype).max, dtype=dtype))


def test_numbers_that_are_no_floats_are_fine():
    assert not_finite({"count": torch.tensor(3), "flags": torch.tensor([True]), "none": torch.empty(0)}) == []
    assert not_finite({}) == []
    assert not_finite({"z": torch.tensor([complex(1, INFINITY)])}) == ["z"]

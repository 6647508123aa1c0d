"""The quantisers of LoftQ against their definitions, and against bitsandbytes where it is installed."""

import pytest
import torch

from veneer.init.quantisers import QUANTISERS, normal_float, normal_float_values

# Table E of the QLoRA paper (https://arxiv.org/abs/2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_nf4_values_are_those_of_the_paper():
    torch.testing.assert_close(normal_float_values(4).float(), torch.tensor(NF4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_normal_float_values(bits):
    values = normal_float_values(bits)
    assert len(values) == 2**bits
    assert (values.diff() > 0).all()
    assert (values[0], values[-1]) == (-1, 1)
    assert 0 in values


@pytest.mark.parametrize("bits", [2, 4])
def test_every_weight_goes_to_the_nearest_value_of_its_block(bits):
    W = torch.randn(16, 24)
    expected = []
    for block in W.flatten().split(64):
        largest = block.abs().max()
        table = normal_float_values(bits).float() * largest
        expected.append(table[(block[:, None] - table).abs().argmin(1)])
    torch.testing.assert_close(normal_float(W, bits), torch.cat(expected).view_as(W))


def test_int8_is_within_half_a_step():
    W = torch.randn(16, 24)
    step = W.abs().amax(1, keepdim=True) / 127
    assert ((QUANTISERS[8](W) - W).abs() <= step * 0.5001).all()
    assert torch.unique((QUANTISERS[8](W) / step).round()).abs().max() == 127


@pytest.mark.parametrize("bits", QUANTISERS)
@pytest.mark.parametrize("shape", [(3, 5), (16, 24), (1, 65)])
def test_quantising_twice_changes_nothing_and_zeros_stay(bits, shape):
    once = QUANTISERS[bits](torch.randn(*shape))
    torch.testing.assert_close(QUANTISERS[bits](once), once)
    assert QUANTISERS[bits](torch.zeros(*shape)).abs().max() == 0


def test_more_bits_lose_less():
    W = torch.randn(64, 64)
    errors = [(QUANTISERS[bits](W) - W).norm() for bits in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2]


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(64, 128)
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(W, blocksize=64, quant_type="nf4"))
    torch.testing.assert_close(normal_float(W, 4), theirs, rtol=1e-5, atol=1e-6)


def test_int8_is_that_of_bitsandbytes():
    """Which rounds to half precision first, so a value on the edge may go to the other side."""
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(64, 128)
    codes, largest, _ = functional.int8_vectorwise_quant(W.half())
    theirs = functional.int8_vectorwise_dequant(codes, largest)
    step = W.abs().amax(1, keepdim=True) / 127
    differences = (QUANTISERS[8](W) - theirs).abs()
    assert (differences < 0.02 * step).float().mean() > 0.9
    assert (differences < 1.1 * step).all()

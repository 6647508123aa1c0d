"""What bitsandbytes keeps in 8 or 4 bits, read back."""

import pytest
import torch
from torch.testing import assert_close

from veneer.errors import MergeError
from veneer.layers.weights import read, store_of
from veneer.layers.weights.bitsandbytes import _unpacked

bnb = pytest.importorskip("bitsandbytes")


def weight() -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


def in_8_bits() -> torch.nn.Module:
    layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight()})
    return layer.to("cpu").eval()


def in_4_bits(*, nested: bool) -> torch.nn.Module:
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=nested)
    layer.load_state_dict({"weight": weight()})
    return layer.to("cpu").eval()


def test_8_bits_before_and_after_the_first_call():
    layer, W = in_8_bits(), weight()
    assert store_of(layer).name == "bnb 8bit"
    before = read(layer)
    assert_close(before, bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB))
    assert_close(before, W, atol=float(W.abs().max() / 127), rtol=0)
    x = torch.randn(3, 128)
    y = layer(x)
    assert torch.equal(read(layer), before)
    assert_close(y, x @ before.T, atol=0.3, rtol=0)  # the inputs are rounded to 8 bits as well


@pytest.mark.parametrize("nested", [False, True])
def test_4_bits_before_and_after_the_first_call(nested):
    layer = in_4_bits(nested=nested)
    assert store_of(layer).name == "bnb 4bit"
    before = read(layer)
    assert torch.equal(before, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    assert_close(before, weight(), atol=0.5, rtol=0)
    with torch.no_grad():
        layer(torch.randn(3, 128))  # a CPU that has the instructions for it gets its weights in another order now
    assert_close(read(layer), before, atol=0, rtol=5e-3)


@pytest.mark.parametrize("nested", [False, True])
def test_4_bits_in_the_order_of_a_cpu(nested):
    layer = in_4_bits(nested=nested)
    before, state = read(layer), layer.weight.quant_state
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    assert_close(_unpacked(packed, state), before.float(), atol=0, rtol=5e-3)  # the scales are in bfloat16 then


def test_weights_of_other_kinds_are_not_taken_for_theirs():
    layer = torch.nn.Linear(4, 4)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MergeError, match="quantised"):
        read(layer)

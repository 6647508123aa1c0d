"""Weights in few bits: read as the layer uses them, rounded again in the same form, put back bit for bit."""

import pytest
import torch
from torch.testing import assert_close

from layers.weights.forms import FORMS, IN, OUT, ROUNDS_INPUTS, made, weight
from veneer.errors import MergeError
from veneer.layers.weights import (
    check_writable,
    is_quantised,
    kept,
    put_back,
    quantised,
    read,
    rounds_inputs,
    store_of,
    write,
)

FAMILIES = {"bnb int8": "bnb 8bit", "bnb": "bnb 4bit", "torchao": "torchao", "quanto": "quanto"}


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("form", [*FORMS, *ROUNDS_INPUTS])
def test_each_form_is_known(form):
    layer = made(form)
    expected = next(name for family, name in FAMILIES.items() if form.startswith(family))
    assert store_of(layer).name == expected
    assert is_quantised(layer)
    assert rounds_inputs(layer.weight) == (form in ROUNDS_INPUTS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_read_as_the_layer_uses_it(form, bias):
    layer, x = made(form, bias=bias), inputs().requires_grad_()
    W = read(layer)
    assert W.shape == (OUT, IN)
    assert type(W) is torch.Tensor
    assert not W.requires_grad
    y = layer(x)
    tolerance = 0.3 if form == "bnb int8" else 1e-5  # which rounds its inputs, too
    assert_close(y, torch.nn.functional.linear(x, W, layer.bias), atol=tolerance, rtol=tolerance)
    y.sum().backward()
    assert_close(x.grad, W.sum(0).expand_as(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(read(layer), W)  # nor does the first call change it


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_in_half_precision_is_read_in_it(form):
    W = read(made(form, dtype=torch.bfloat16))
    assert W.dtype == (torch.float32 if form == "bnb int8" else torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_rounded_is_not_rounded_further(form):
    layer = made(form)
    again, loss = quantised(layer, "weight", read(layer))
    assert loss.relative < 1e-3  # scales in 8 bits are rounded again themselves
    assert type(again) is type(layer.weight)
    assert loss.update == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_another_weight_is_rounded_as_the_library_rounds_it(form):
    """The form takes over all settings of the weight before, so the two agree exactly."""
    layer, other = made(form), made(form)
    for called in (False, True):
        if called:
            layer(inputs())
        rounded, loss = quantised(layer, "weight", 2 * weight())  # twice the scales, the same integers
        tolerance = 2e-3 if form == "bnb nf4 twice" else 0  # the scales are in 8 bits there
        assert_close(store_of(layer).value(rounded), 2 * read(other), atol=tolerance, rtol=tolerance)
        assert 0 < loss.relative < 0.2
        assert loss.of_update == pytest.approx(loss.relative * 2, rel=0.2)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_written_used_and_put_back(form, called):
    layer, x = made(form), inputs()
    if called:
        layer(x)
    before, W = layer.weight, read(layer)
    expected = layer(x) if called else None
    original = kept(layer)
    rounded, _ = quantised(layer, "weight", 3 * weight())
    assert layer.weight is before
    assert torch.equal(read(layer), W)
    write(layer, "weight", rounded)
    tolerance = 1.0 if form.startswith("bnb") else 1e-3  # which may compute in fewer bits
    assert_close(layer(x), x @ read(layer).T, atol=tolerance, rtol=1e-4)
    assert read(layer).norm() > 2 * W.norm()
    put_back(layer, "weight", original)
    assert layer.weight is before
    assert torch.equal(read(layer), W)
    if expected is not None:
        assert torch.equal(layer(x), expected)
    assert layer.state_dict().keys() == made(form).state_dict().keys()


def test_put_back_where_the_model_was_cast_since():
    layer = made("torchao int4")  # the others keep the dtype that they were made in
    original = kept(layer)
    rounded, _ = quantised(layer, "weight", 3 * weight())
    write(layer, "weight", rounded)
    layer.to(torch.bfloat16)
    put_back(layer, "weight", original)
    assert layer.weight.dtype == read(layer).dtype == torch.bfloat16
    assert_close(read(layer).float(), read(made("torchao int4")), atol=2e-2, rtol=2e-2)
    assert layer(inputs(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_it_is_not_rounded_again_unasked(form):
    layer = made(form)
    with pytest.raises(MergeError, match=r"q_proj is quantised .*unquantised.*or pass requantize=True"):
        check_writable(layer, "weight", "q_proj")
    check_writable(layer, "weight", "q_proj", requantize=True)


def test_what_can_only_be_read_says_so(monkeypatch):
    layer = made("torchao int8")
    from veneer.layers.weights import torchao

    monkeypatch.delitem(torchao._QUANTISE, "Int8Tensor")  # as of a class whose making is not known here
    assert read(layer).shape == (OUT, IN)
    with pytest.raises(MergeError, match="can be read, not made"):
        check_writable(layer, "weight", "q_proj", requantize=True)


def test_a_plain_weight_is_not_quantised():
    layer = torch.nn.Linear(4, 3)
    assert not is_quantised(layer)
    assert not rounds_inputs(layer.weight)
    check_writable(layer, "weight", "it")

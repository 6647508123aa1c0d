"""Biases trained beside an adapter, and the originals that come back."""

import pytest
import torch

import tiny
import veneer
from veneer.errors import AttachError


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("lora_only", {"first.bias"}), ("all", {"first.bias", "norm.bias", "head.bias"}), ("none", set())],
)
def test_which_biases_train(bias, trained):
    model = veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first", "second"], bias=bias))
    base = model.get_base_model()
    assert {n for n, p in base.named_parameters() if p.requires_grad and "lora_" not in n} == trained


def test_disabling_switching_and_unloading_give_the_originals_back():
    base = tiny.Stack()
    model = veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["first"], bias="all"))
    model.add_adapter("plain", veneer.LoraConfig(target_modules=["second"]))
    tiny.shake(model)
    x, fresh = tiny.ids(20), tiny.Stack()
    trained = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), fresh(x))
        assert not base.norm.bias.requires_grad
    assert torch.equal(model(x), trained)
    assert base.norm.bias.requires_grad
    model.set_adapter("plain")
    torch.testing.assert_close(model(x), fresh(x))
    model.set_adapter("default")
    assert torch.equal(model(x), trained)
    plain = model.unload()
    assert torch.equal(plain(x), fresh(x))


def test_merging_keeps_the_trained_values():
    model = tiny.shake(veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"], bias="all")))
    x = tiny.ids(20)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_only_one_adapter_may_train_biases():
    model = veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"], bias="all"))
    with pytest.raises(AttachError, match="only one adapter can"):
        model.add_adapter("b", veneer.LoraConfig(target_modules=["first"], bias="lora_only"))
    assert list(model.peft_config) == ["default"]

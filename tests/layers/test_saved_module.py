"""Modules trained in full beside the adapters."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer.errors import AttachError, MergeError, TargetError, VeneerWarning
from veneer.layers.saved_module import Saved


def model_with_head() -> veneer.PeftModel:
    return veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"], modules_to_save=["head"]))


def test_the_copy_trains_and_the_original_stays():
    model = model_with_head()
    head = model.get_base_model().head
    original = head.weight.detach().clone()
    assert isinstance(head, Saved)
    assert not head.weight.requires_grad
    tiny.shake(model)
    x = tiny.ids(20)
    changed = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), tiny.Stack()(x))
    assert torch.equal(head.weight, original)
    assert not torch.equal(changed, tiny.Stack()(x))


def test_each_adapter_has_its_own_copy():
    model = model_with_head()
    model.add_adapter("b", veneer.LoraConfig(target_modules=["first"], modules_to_save=["head"]))
    tiny.shake(model)
    x = tiny.ids(20)
    with_a = model(x)
    model.set_adapter("b")
    base = tiny.Stack()
    torch.testing.assert_close(model(x), base(x))
    assert model.get_base_model().head.modules_to_save["b"].weight.requires_grad
    assert not model.get_base_model().head.modules_to_save["default"].weight.requires_grad
    model.set_adapter("default")
    assert torch.equal(model(x), with_a)
    model.delete_adapter("b")
    assert torch.equal(model(x), with_a)


def test_unloading_leaves_nothing():
    model = model_with_head()
    tiny.shake(model)
    plain = model.unload()
    fresh = tiny.Stack()
    assert type(plain.head) is nn.Linear
    assert set(vars(plain.head)) == set(vars(fresh.head))
    for name, value in fresh.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


def test_merging_takes_the_copy_over():
    model = model_with_head()
    tiny.shake(model)
    x = tiny.ids(20)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), expected)
    assert list(plain.state_dict()) == list(tiny.Stack().state_dict())


def test_two_copies_of_one_module_cannot_both_be_merged():
    model = model_with_head()
    model.add_adapter("b", veneer.LoraConfig(target_modules=["first"], modules_to_save=["head"]))
    with pytest.raises(MergeError, match="both train head"):
        model.merge_adapter(["default", "b"])


def test_a_container_with_submodules():
    model = veneer.get_peft_model(
        tiny.bert(), veneer.LoraConfig(target_modules=["query"], modules_to_save=["pooler"], task_type="SEQ_CLS")
    )
    assert model.active_peft_config.modules_to_save == ["pooler", "classifier"]
    tiny.shake(model)
    x = tiny.ids()
    expected = model(x).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x).logits, expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model(clone):
    model = tiny.shake(model_with_head())
    x = tiny.ids(20)
    assert torch.equal(clone(model)(x), model(x))


def test_clashes_are_refused_and_change_nothing():
    model = model_with_head()
    with pytest.raises(AttachError, match="another adapter trains head in full"):
        model.add_adapter("b", veneer.LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(AttachError, match="holds layers that another adapter adapts"):
        model.add_adapter("b", veneer.LoraConfig(target_modules=["second"], modules_to_save=["first"]))
    assert list(model.peft_config) == ["default"]
    assert type(model.get_base_model().second) is nn.Linear


def test_a_name_matches_at_a_dot_only():
    with pytest.raises(TargetError, match="'ead' matches nothing"):
        veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"], modules_to_save=["ead"]))


def test_of_two_copies_the_one_of_the_last_active_adapter_acts():
    model = model_with_head()
    model.add_adapter("b", veneer.LoraConfig(target_modules=["second"], modules_to_save=["head"]))
    tiny.shake(model)
    with pytest.warns(VeneerWarning, match="head is trained in full .* the copy of 'b'"):
        model.set_adapter(["default", "b"])
    head, x = model.get_base_model().head, torch.randn(2, model.get_base_model().head.in_features)
    assert torch.equal(head(x), head.modules_to_save["b"](x))
    assert not torch.equal(head(x), head.modules_to_save["default"](x))

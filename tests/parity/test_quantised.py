"""Files between Veneer and PEFT over one quantised base, and what both make of a merge into it."""

import peft
import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from model.quantised import adapted, loaded, logits, save_base
from parity.oracle import quietly
from veneer.layers.weights import read

PATH = "model.layers.0.self_attn.q_proj"
FIELDS = ({}, {"use_rslora": True}, {"use_dora": True})
# Both compute as in training: in evaluation on some CPUs bitsandbytes reorders 4-bit weights, and PEFT then takes the
# norms of DoRA from what it reads there as if it had not.
METHODS = ("bnb int8", "bnb nf4", "torchao int8", "torchao int4", "quanto int8")
CASES = [(method, fields) for method in METHODS for fields in FIELDS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def in_peft(base, **fields):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    return tiny.shake(quietly(peft.get_peft_model, base, peft.LoraConfig(**settings)), std=0.1)


@pytest.mark.parametrize(("method", "fields"), CASES, ids=str)
def test_an_adapter_of_peft_gives_the_same_here(checkpoint, tmp_path, method, fields):
    theirs = in_peft(loaded(checkpoint, method), **fields).train()
    quietly(theirs.save_pretrained, str(tmp_path))
    ours = veneer.PeftModel.from_pretrained(loaded(checkpoint, method), tmp_path, is_trainable=True).train()
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "fields"), CASES, ids=str)
def test_an_adapter_of_ours_gives_the_same_there(checkpoint, tmp_path, method, fields):
    ours = tiny.shake(adapted(loaded(checkpoint, method), **fields), std=0.1).train()
    ours.save_pretrained(tmp_path)
    theirs = quietly(peft.PeftModel.from_pretrained, loaded(checkpoint, method), str(tmp_path)).train()
    assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_gradients(checkpoint, tmp_path, method, fields):
    theirs = in_peft(loaded(checkpoint, method), **fields).train()
    quietly(theirs.save_pretrained, str(tmp_path))
    ours = veneer.PeftModel.from_pretrained(loaded(checkpoint, method), tmp_path, is_trainable=True).train()
    found = []
    for model in (ours, theirs):
        model(tiny.ids(), labels=tiny.ids()).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, atol=float(1e-4 * other.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("method", ["bnb int8", "bnb nf4", "torchao int8"])
def test_a_merge_rounded_again_is_pefts(checkpoint, tmp_path, method):
    """PEFT rounds again without being asked; what comes out is the same but for its float32 sums."""
    theirs = in_peft(loaded(checkpoint, method)).eval()
    quietly(theirs.save_pretrained, str(tmp_path))
    ours = veneer.PeftModel.from_pretrained(loaded(checkpoint, method), tmp_path)
    merged = quietly(theirs.merge_and_unload).get_submodule(PATH)
    with pytest.warns(veneer.errors.VeneerWarning, match="rounded again"):
        mine = ours.merge_and_unload(requantize=True).get_submodule(PATH)
    one, other = read(mine), read(merged)
    assert type(mine.weight) is type(merged.weight)
    step = float(other.abs().max()) / (7 if method == "bnb nf4" else 127)
    assert ((one - other).abs() < 0.05 * step).float().mean() > 0.99
    assert (one - other).norm() < 0.02 * other.norm()

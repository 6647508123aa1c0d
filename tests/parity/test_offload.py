"""Offloaded and quantised bases here and in PEFT."""

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
import veneer
from parity import oracle
from parity.test_parity import TIGHT, our_gradients


def gradients(model: nn.Module, theirs: bool) -> dict:
    model.zero_grad()
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    return oracle.gradients(model) if theirs else our_gradients(model)


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = gradients(theirs, theirs=True)
    found = gradients(ours, theirs=False)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key], **TIGHT)


def offloaded(folder: Path) -> nn.Module:
    """As `device_map` does it: over what `cpu_offload` made, PEFT leaves its adapters on the meta device."""
    where = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk", "model.rotary_emb": "cpu"}
    return dispatch_model(tiny.llama(), {**where, "lm_head": "disk"}, offload_dir=str(folder / "weights"))


def test_an_offloaded_base(tmp_path):
    import peft

    reference = tiny.shake(oracle.made_by_peft(tiny.llama(), r=2, target_modules=["q_proj", "down_proj"]))
    oracle.save(reference, tmp_path)
    theirs = oracle.quietly(peft.PeftModel.from_pretrained, offloaded(tmp_path), str(tmp_path), is_trainable=True)
    ours = veneer.PeftModel.from_pretrained(offloaded(tmp_path), tmp_path, is_trainable=True)
    assert_close(ours(tiny.ids()).logits, theirs(tiny.ids()).logits, **TIGHT)
    same_gradients(ours, theirs)
    merged, expected = ours.merge_and_unload(), oracle.quietly(theirs.merge_and_unload)
    assert_close(merged(tiny.ids()).logits, expected(tiny.ids()).logits, **TIGHT)


def test_a_base_in_8_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    import peft

    tiny.llama().save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        settings = BitsAndBytesConfig(load_in_8bit=True)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map="auto", quantization_config=settings, dtype=torch.float32
        )

    settings = veneer.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    ours = tiny.shake(veneer.get_peft_model(base(), settings))
    ours.save_pretrained(tmp_path / "adapter")
    theirs = oracle.quietly(peft.PeftModel.from_pretrained, base(), str(tmp_path / "adapter"), is_trainable=True)
    ours.train(), theirs.train()
    assert_close(ours(tiny.ids()).logits, theirs(tiny.ids()).logits, **TIGHT)
    same_gradients(ours, theirs)

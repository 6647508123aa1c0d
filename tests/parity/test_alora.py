"""Activated LoRA, as PEFT runs it, and files that either writes."""

import copy

import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from parity.oracle import gradients, made_by_peft, quietly, read_by_peft, save

INVOCATION = [7, 9]
FIELDS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}
ACTIVATED = {**FIELDS, "alora_invocation_tokens": INVOCATION}


def prompts() -> torch.Tensor:
    """Invoked once, twice, at the very end, and never."""
    x = tiny.ids(rows=4, tokens=8)
    x[(x == 7) | (x == 9)] = 11
    x[0, 2:4] = x[1, 1:3] = x[1, 5:7] = x[2, -2:] = torch.tensor(INVOCATION)
    return x


def pair(tmp_path, **fields):
    base = tiny.llama()
    theirs = tiny.shake(made_by_peft(base, **{**ACTIVATED, **fields}))
    ours = veneer.PeftModel.from_pretrained(base, save(theirs, tmp_path / "theirs"), is_trainable=True)
    return theirs.eval(), ours.eval()


def test_forward_and_a_file_there_and_back(tmp_path):
    theirs, ours = pair(tmp_path)
    x = prompts()
    expected = theirs(x).logits
    assert_close(ours(x).logits, expected, rtol=1e-5, atol=1e-5)
    with ours.disable_adapter():
        assert_close(ours(x).logits[3], expected[3], rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    assert_close(read_by_peft(tiny.llama(), tmp_path / "ours")(x).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offsets", [[3, None, 8, 1], [None] * 4, [20, 2, 2, 2]])
def test_offsets_that_are_given(offsets, tmp_path):
    theirs, ours = pair(tmp_path)
    x = prompts()
    expected = theirs(x, alora_offsets=offsets).logits
    assert_close(ours(x, alora_offsets=offsets).logits, expected, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "alora_offsets": offsets}
    assert torch.equal(ours.generate(x, **options), quietly(theirs.generate, x, **options))


@pytest.mark.parametrize("padded", [False, True])
def test_generate(padded, tmp_path):
    theirs, ours = pair(tmp_path)
    x = prompts()
    mask = torch.ones_like(x)
    if padded:
        x[0, 0], mask[0, 0] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(ours.generate(x, **options), quietly(theirs.generate, x, **options))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing, tmp_path):
    theirs, ours = pair(tmp_path)
    x = prompts()[:3]
    for model in (theirs, ours):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(x, labels=x).loss.backward()
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    for name, gradient in gradients(theirs).items():
        key = name.replace(".lora_A.weight", ".adapters.default.lora_A").replace(
            ".lora_B.weight", ".adapters.default.lora_B"
        )
        assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


def test_activated_and_plain_adapters_in_one_batch(tmp_path):
    import peft

    theirs, _ = pair(tmp_path)
    quietly(theirs.add_adapter, "plain", peft.LoraConfig(**FIELDS))
    theirs.set_adapter("plain")
    tiny.shake(theirs, seed=9)
    theirs.set_adapter("default")
    theirs.eval()
    save(theirs, tmp_path)
    ours = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    ours.load_adapter(tmp_path / "plain", "plain")
    x = prompts()
    names = ["default", "plain", "__base__", "default"]
    assert_close(ours(x, adapter_names=names).logits, theirs(x, adapter_names=names).logits, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "adapter_names": names}
    assert torch.equal(ours.generate(x, **options), quietly(theirs.generate, x, **options))


def test_where_peft_is_wrong_without_a_cache(tmp_path):
    """PEFT counts from the end of what has been generated so far, so that the invocation slips out of its reach."""
    theirs, ours = pair(tmp_path)
    x = prompts()[:2]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    scores = {"return_dict_in_generate": True, "output_logits": True}
    cached = ours.generate(x, **options, **scores)
    anew = ours.generate(x, **options, **scores, use_cache=False)
    assert_close(torch.stack(anew.logits), torch.stack(cached.logits), rtol=1e-4, atol=1e-4)
    wrong = quietly(copy.deepcopy(theirs).generate, x, **options, **scores, use_cache=False)
    steps = min(len(wrong.logits), len(cached.logits))
    with pytest.raises(AssertionError):
        assert_close(torch.stack(wrong.logits[:steps]), torch.stack(cached.logits[:steps]), rtol=1e-3, atol=1e-3)

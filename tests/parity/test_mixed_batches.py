"""Batches of several adapters, as PEFT runs them where it can."""

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from parity.oracle import quietly, save

NAMES = ["one", "__base__", "two", "one"]
CASES = {
    "LoRA": ({"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["v_proj", "q_proj"], "r": 3}),
    "rsLoRA": ({"target_modules": ["q_proj"], "use_rslora": True}, {"target_modules": ["v_proj"], "lora_alpha": 32}),
    "embedding": ({"target_modules": ["embed_tokens", "k_proj"]}, {"target_modules": ["embed_tokens"], "r": 3}),
    "heads": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ),
}


def pair(case: str, folder: Path):
    """The same two adapters on the same model: PEFT's and ours."""
    import peft

    base = tiny.llama()
    one, two = CASES[case]
    theirs = quietly(peft.get_peft_model, copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **one), "one")
    quietly(theirs.add_adapter, "two", peft.LoraConfig(task_type="CAUSAL_LM", **two))
    for seed, name in enumerate(("one", "two")):
        theirs.set_adapter(name)
        tiny.shake(theirs, seed=seed)
    theirs.set_adapter("one")
    save(theirs, folder)
    ours = veneer.PeftModel.from_pretrained(base, folder / "one", "one")
    ours.load_adapter(folder / "two", "two")
    return theirs.eval(), ours


@pytest.mark.parametrize("case", CASES)
def test_forward_and_generate(case, tmp_path):
    theirs, ours = pair(case, tmp_path)
    x = tiny.ids(rows=4)
    assert_close(ours(x, adapter_names=NAMES).logits, theirs(x, adapter_names=NAMES).logits, rtol=1e-5, atol=1e-5)
    for beams in (1, 2):
        options = {"max_new_tokens": 6, "do_sample": False, "adapter_names": NAMES, "num_beams": beams}
        assert torch.equal(ours.generate(input_ids=x, **options), theirs.generate(input_ids=x, **options))


@pytest.mark.parametrize(
    ("names", "text"),
    [(["one", "two"], "2 (names|and 4)"), (["one", "typo", "__base__", "two"], "typo")],
)
def test_what_peft_refuses_is_refused(names, text, tmp_path):
    theirs, ours = pair("LoRA", tmp_path)
    for model in (theirs, ours):
        with pytest.raises(ValueError, match=text):
            model(tiny.ids(rows=4), adapter_names=names)

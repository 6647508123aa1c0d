"""PEFT loads from the hub what Veneer pushed, and the other way round."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel as Peft
from peft import get_peft_model as peft_model

import tiny
from veneer import LoraConfig, PeftModel, get_peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks for it
]
TOKENS = torch.arange(12).reshape(2, 6)
FIELDS = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def test_peft_loads_what_was_pushed(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    ours = get_peft_model(tiny.llama(), LoraConfig(**FIELDS))
    ours.push_to_hub("user/ours", private=True)
    theirs = Peft.from_pretrained(tiny.llama(), "user/ours")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-6)
    ours.push_to_hub("user/ours", revision="v2")
    theirs = Peft.from_pretrained(tiny.llama(), "user/ours", revision="v2")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-6)


def test_what_peft_pushed_loads_and_is_pushed_again(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    theirs = peft_model(tiny.llama(), PeftConfig(**FIELDS))
    theirs.push_to_hub("user/theirs")
    ours = PeftModel.from_pretrained(tiny.llama(), "user/theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    before = hub["user/theirs"].files()["README.md"].decode()
    ours.push_to_hub("user/theirs")
    after = hub["user/theirs"].files()["README.md"].decode()
    assert after.partition("\n---\n")[2] == before.partition("\n---\n")[2]

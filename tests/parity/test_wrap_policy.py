"""What FullyShardedDataParallel is told to put apart, beside what PEFT tells it."""

import peft
import pytest
from peft.utils.other import fsdp_auto_wrap_policy as peft_policy
from torch import nn

import tiny
import veneer
from veneer.errors import AttachError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for what PEFT asks it


def wrapped(model: nn.Module, policy) -> set[str]:
    return {path for path, module in model.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=0)}


def without(paths: set[str], child: str) -> set[str]:
    """Paths of layers instead of those of what lies on them, and without what a facade puts before them."""
    return {path.partition(child)[0].removeprefix("base_model.model.") for path in paths}


@pytest.mark.parametrize("named", [None, "LlamaMLP", "LlamaMLP,LlamaAttention"])
def test_it_is_what_peft_wraps(named, monkeypatch):
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    if named:
        monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", named)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1, "modules_to_save": ["lm_head"]}
    ours = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**config))
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(**config))
    found = without(wrapped(ours, veneer.fsdp_auto_wrap_policy(ours)), ".adapters.")
    assert found == {
        path.replace(".lora_B", "")
        for path in without(wrapped(theirs, peft_policy(theirs)), ".lora_A.default")
        if not path.endswith(".lora_B.default")
    }
    assert len(found) > 5


def test_adapters_that_are_read_stay_with_their_owner():
    config = veneer.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model = veneer.get_peft_model(tiny.llama(), config)
    assert not any("token_rows" in path for path in wrapped(model, veneer.fsdp_auto_wrap_policy(model)))


def test_a_class_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,GPT2Block")
    with pytest.raises(AttachError, match="names GPT2Block, and LlamaForCausalLM has no module of that class"):
        veneer.fsdp_auto_wrap_policy(tiny.llama())

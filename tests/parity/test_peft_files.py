"""Adapter files with what PEFT puts there beyond the adapter, or finds by rules of its own."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from families import FAMILIES, logits
from parity import oracle
from veneer.errors import AdapterFileError, VeneerWarning

ENDS = {  # names that PEFT finds at the end of others too
    "llama": ["norm"],
    "t5": ["layer_norm"],
    "whisper": ["layer_norm"],
}


def both_ways(family, folder, *, save_embedding_layers=False, **fields):
    """Made by PEFT and read here; written here and read by PEFT: one answer. Returns the model read here."""
    base = family.model()
    theirs = tiny.shake(oracle.made_by_peft(base, **fields), std=0.05).eval()
    oracle.quietly(theirs.save_pretrained, folder / "theirs", save_embedding_layers=save_embedding_layers)
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder / "theirs").eval()
    ours.save_pretrained(folder / "ours")
    again = oracle.read_by_peft(base, folder / "ours").eval()
    with torch.no_grad():
        expected = logits(theirs, family)
        assert not torch.allclose(expected, logits(base, family), atol=1e-3), "a void test"
        assert_close(logits(ours, family), expected, rtol=1e-4, atol=2e-5)
        assert_close(logits(again, family), expected, rtol=1e-4, atol=2e-5)
    return ours


@pytest.mark.parametrize(("name", "bias"), [*((name, "none") for name in ENDS), ("whisper", "all")])
def test_modules_that_peft_finds_by_the_end_of_their_name(name, bias, tmp_path):
    family = FAMILIES[name]
    both_ways(family, tmp_path, target_modules=family.some, modules_to_save=ENDS[name], bias=bias)


@pytest.mark.parametrize("name", ENDS)
def test_a_name_that_means_more_to_peft_is_written_longer(name, tmp_path):
    family = FAMILIES[name]
    config = veneer.LoraConfig(target_modules=family.some, modules_to_save=ENDS[name])
    ours = tiny.shake(veneer.get_peft_model(family.model(), config)).eval()
    ours.save_pretrained(tmp_path)
    theirs = oracle.read_by_peft(family.model(), tmp_path).eval()
    with torch.no_grad():
        assert_close(logits(theirs, family), logits(ours, family), rtol=1e-4, atol=2e-5)
    again = veneer.PeftModel.from_pretrained(family.model(), tmp_path)
    resolved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert again.peft_config["default"].modules_to_save == resolved


@pytest.mark.parametrize("name", ["albert", "vit", "llama", "whisper"])
@pytest.mark.parametrize("targets", ["some", "embeddings"])
def test_a_file_with_the_embeddings(name, targets, tmp_path):
    """The head's bias is among them, and what an embedding of patches holds."""
    family = FAMILIES[name]
    own = {"albert": ["decoder"], "vit": ["projection"], "whisper": ["proj_out"], "llama": ["lm_head"]}
    fields = {"target_modules": family.some if targets == "some" else [*family.some, *own.get(name, [])]}
    both_ways(family, tmp_path, save_embedding_layers=True, **fields)


def test_a_file_with_another_bias_of_the_head_is_refused(tmp_path):
    family = FAMILIES["albert"]
    theirs = oracle.made_by_peft(family.model(), target_modules=family.some)
    oracle.quietly(theirs.save_pretrained, tmp_path, save_embedding_layers=True)
    other = family.model()
    other.predictions.decoder.bias.data.add_(1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(AdapterFileError, match=r"brings its own predictions\.decoder\.bias"):
        veneer.PeftModel.from_pretrained(other, tmp_path)
    assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_biases_deep_in_a_saved_module(tmp_path):
    """PEFT repeats them under a key in which the adapter's name stays."""
    family = FAMILIES["albert"]
    both_ways(family, tmp_path, target_modules=family.some, modules_to_save=["predictions"], bias="all")


def test_a_target_that_layers_to_transform_leaves_out(tmp_path):
    with pytest.warns(VeneerWarning, match="which layers_to_transform leaves out"):
        both_ways(FAMILIES["gpt2"], tmp_path, target_modules=["wte", "c_attn"], layers_to_transform=[0])


def test_a_bias_that_means_none_beside_experts(tmp_path):
    fields = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "bias": "lora_only"}
    with pytest.warns(VeneerWarning, match="there is no bias to train"):
        both_ways(FAMILIES["mixtral"], tmp_path, **fields)


def test_the_file_of_an_older_peft(tmp_path):
    """The fields that 0.3 wrote, and no more."""
    family = FAMILIES["llama"]
    theirs = tiny.shake(oracle.made_by_peft(family.model(), target_modules=family.some)).eval()
    oracle.save(theirs, tmp_path)
    old = {
        "base_model_name_or_path": "somewhere/llama", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA",
        "r": 8, "target_modules": family.some, "task_type": "CAUSAL_LM", "enable_lora": None, "merge_weights": False,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    ours = veneer.PeftModel.from_pretrained(family.model(), tmp_path).eval()
    with torch.no_grad():
        assert_close(logits(ours, family), logits(theirs, family), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("corda_config", {"corda_method": "ipm", "verbose": False}),
        ("lora_ga_config", {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16}),
        ("eva_config", {"rho": 2.0}),
        ("loftq_config", {"loftq_bits": 4, "loftq_iter": 1}),
    ],
)
def test_settings_of_a_start_that_is_over(name, value, tmp_path):
    """PEFT leaves them in a file that it has converted to a plain LoRA."""
    oracle.save(oracle.made_by_peft(tiny.llama(), target_modules=["q_proj"]), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, name: value}))
    ours = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert getattr(ours.peft_config["default"], name) is None

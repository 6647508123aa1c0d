"""Each architecture, adapted as people do it: outputs, gradients, merged weights and files equal PEFT's."""

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from families import FAMILIES, logits
from parity import oracle
from veneer.model.tensors import adapter_tensors

TIGHT = {"rtol": 1e-4, "atol": 1e-5}
VARIANTS: dict[str, dict[str, Any]] = {
    "some": {},
    "all-linear": {"target_modules": "all-linear", "r": 1},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}
# Where experts are fused, "all-linear" means them too in PEFT, and only layers here (target_parameters names experts).
FUSED = {"mixtral", "qwen2-moe", "qwen3-moe"}
case = pytest.mark.parametrize("variant", list(VARIANTS))
every = pytest.mark.parametrize("name", list(FAMILIES))


def linear_names(base: Any) -> list[str]:
    """What "all-linear" means here, by name."""
    found = {path.rpartition(".")[2] for path, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(found - {"lm_head"})


def made_alike(name: str, variant: str, tmp_path: Any) -> tuple[Any, Any, Any]:
    family = FAMILIES[name]
    base = family.model()
    fields = {"r": 4, "lora_alpha": 6, "target_modules": family.some, **VARIANTS[variant]}
    if name == "gpt2":
        fields["fan_in_fan_out"] = True
    if name in FUSED and fields["target_modules"] == "all-linear":
        fields["target_modules"] = linear_names(base)
    theirs = tiny.shake(oracle.made_by_peft(base, **fields)).eval()
    folder = oracle.save(theirs, tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    return base, theirs, ours


@every
@case
def test_outputs_gradients_and_merged_weights(name, variant, tmp_path):
    family = FAMILIES[name]
    base, theirs, ours = made_alike(name, variant, tmp_path)
    expected, found = logits(theirs, family), logits(ours, family)
    with torch.no_grad():  # with gradients, torch may attend by another kernel
        plain = logits(base, family)
    assert not torch.allclose(expected, plain, atol=1e-4), "the adapter does nothing: a void test"
    assert_close(found, expected, **TIGHT)
    for answer in (expected, found):
        answer.square().mean().backward()
    by_storage = {p.data_ptr(): p.grad for p in ours.bare.parameters() if p.requires_grad}
    mine = {key: by_storage[value.data_ptr()] for key, value in adapter_tensors(ours.bare, "default").items()}
    for key, gradient in oracle.gradients(theirs).items():
        assert_close(mine[key], gradient, **TIGHT, msg=lambda text, key=key: f"{key}: {text}")
    with torch.no_grad(), ours.disable_adapter():
        assert torch.equal(logits(ours, family), plain)
    merged = ours.merge_and_unload()
    with torch.no_grad():
        assert_close(logits(merged, family), found, **TIGHT)
    weights = oracle.quietly(theirs.merge_and_unload).state_dict()
    for key, value in merged.state_dict().items():
        assert_close(value, weights[key], **TIGHT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.filterwarnings("ignore:'all-linear' leaves")
@every
def test_a_new_adapter_has_pefts_tensors_and_goes_back_and_forth(name, tmp_path):
    family = FAMILIES[name]
    base = family.model()
    config = veneer.LoraConfig(r=1, target_modules="all-linear", init_lora_weights=False)
    ours = veneer.get_peft_model(copy.deepcopy(base), config, generator=torch.Generator().manual_seed(1))
    theirs = linear_names(base) if name in FUSED else "all-linear"
    expected = {
        key: tuple(value.shape)
        for key, value in oracle.values(oracle.made_by_peft(base, r=1, target_modules=theirs)).items()
    }
    found = adapter_tensors(ours.bare, "default")
    assert {key: tuple(value.shape) for key, value in found.items()} == expected
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        answer = logits(ours, family)
        assert_close(logits(oracle.read_by_peft(base, tmp_path / "ours").eval(), family), answer, **TIGHT)
        again = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        assert_close(logits(again, family), answer, **TIGHT)
    for key, value in adapter_tensors(again.bare, "default").items():
        assert torch.equal(value, found[key])
    plain = again.unload()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, base.state_dict()[key])


def test_a_shared_layer_has_one_adapter():
    """ALBERT runs one layer three times: one adapter on it, counted and merged once."""
    family = FAMILIES["albert"]
    base = family.model()
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(r=2, target_modules=["query"]))
    assert ours.get_nb_trainable_parameters()[0] == 2 * (32 + 32)
    tiny.shake(ours)
    answer = logits(ours, family)
    assert not torch.allclose(answer, logits(base, family), atol=1e-5)
    assert_close(logits(ours.merge_and_unload(), family), answer, **TIGHT)

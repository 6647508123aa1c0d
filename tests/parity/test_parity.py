"""The same adapter here and in PEFT: outputs, gradients, a training step, merged weights, files both ways."""

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.model.tensors import adapter_tensors, bias_key

TIGHT = {"rtol": 1e-4, "atol": 1e-5}

FAMILIES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "stack": tiny.Stack}
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True},
    "bert": {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"},
    "stack": {"target_modules": ["first", "second", "tokens"], "modules_to_save": ["head"]},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "biases": {"bias": "all"},
    "biases-of-targets": {"bias": "lora_only"},
    "dora-biases": {"use_dora": True, "bias": "lora_only"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random-start": {"init_lora_weights": False},
}
MORE: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "all-linear", {"target_modules": "all-linear"}),
    ("bert", "all-linear", {"target_modules": "all-linear"}),
    ("gpt2", "all-linear", {"target_modules": "all-linear"}),
    ("llama", "regex", {"target_modules": r".*layers\.1\..*_proj"}),
    ("llama", "excluded", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("llama", "some-layers", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", "patterns", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_.*": 3}}),
    ("llama", "rslora-patterns", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    ("llama", "embedding", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", "embedding-dora", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    ("llama", "head", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", "saved", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ("gpt2", "bias-of-its-own", {"lora_bias": True}),
    ("bert", "bias-of-its-own", {"lora_bias": True, "use_rslora": True, "bias": "lora_only"}),
    ("gpt2", "wte", {"target_modules": ["c_proj", "wte"], "fan_in_fan_out": True}),
]
CASES = [
    (family, variant, fields)
    for family in FAMILIES
    for variant, fields in VARIANTS.items()
    if not ("bias" in fields and family == "llama")
] + MORE
case = pytest.mark.parametrize(
    ("family", "fields"),
    [pytest.param(family, {**TARGETS[family], **fields}, id=f"{family}-{name}") for family, name, fields in CASES],
)


def run(model: Any, family: str) -> torch.Tensor:
    if family == "stack":
        return model(tiny.ids(20))
    return model(tiny.ids()).logits


def made_alike(family: str, fields: dict[str, Any], tmp_path: Any) -> tuple[Any, Any, Any]:
    base = FAMILIES[family]()
    theirs = tiny.shake(oracle.made_by_peft(base, **{"r": 4, "lora_alpha": 6, **fields})).eval()
    folder = oracle.save(theirs, tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    return base, theirs, ours


def our_gradients(ours: veneer.PeftModel) -> dict[str, torch.Tensor | None]:
    model = ours.get_base_model()
    by_storage = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    return {key: by_storage[value.data_ptr()] for key, value in adapter_tensors(model, "default").items()}


@case
def test_outputs_are_equal(family, fields, tmp_path):
    base, theirs, ours = made_alike(family, fields, tmp_path)
    with torch.no_grad():
        expected = run(theirs, family)
        assert not torch.allclose(expected, run(base, family), atol=1e-3), "the adapter does nothing: a void test"
        assert_close(run(ours, family), expected, **TIGHT)


@case
def test_gradients_and_a_training_step_are_equal(family, fields, tmp_path):
    _, theirs, ours = made_alike(family, fields, tmp_path)
    for model in (theirs, ours):
        run(model, family).square().mean().backward()
    expected, found = oracle.gradients(theirs), our_gradients(ours)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert_close(found[key], gradient, **TIGHT, msg=lambda text, key=key: f"{key}: {text}")
    for model in (theirs, ours):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    with torch.no_grad():
        assert_close(run(ours, family), run(theirs, family), **TIGHT)


@case
def test_merged_weights_are_equal(family, fields, tmp_path):
    _, theirs, ours = made_alike(family, fields, tmp_path)
    expected = oracle.quietly(theirs.merge_and_unload).state_dict()
    merged = ours.merge_and_unload()
    found = merged.state_dict()
    assert list(found) == list(FAMILIES[family]().state_dict()), "merging leaves the base's own names"
    for name, value in found.items():
        assert_close(value, expected[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@case
def test_what_we_write_peft_reads(family, fields, tmp_path):
    base, theirs, ours = made_alike(family, fields, tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    read = oracle.read_by_peft(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert_close(run(read, family), run(theirs, family), **TIGHT)
    expected, found = oracle.values(theirs), oracle.values(read)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@case
def test_a_new_adapter_has_the_same_tensors_as_pefts(family, fields):
    """Names, shapes and trainable counts of a fresh adapter, before any training."""
    base = FAMILIES[family]()
    theirs = oracle.made_by_peft(base, **{"r": 4, **fields})
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**{"r": 4, **fields}))
    expected = {key: tuple(value.shape) for key, value in oracle.values(theirs).items()}
    found = {key: tuple(v.shape) for key, v in adapter_tensors(ours.get_base_model(), "default").items()}
    assert {k: v for k, v in expected.items() if "original_module" not in k and ".modules_to_save." not in k} == found
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("dora", [False, True])
def test_two_adapters_acting_together(dora, tmp_path):
    base = tiny.llama()
    fields = {"r": 4, "task_type": "CAUSAL_LM", "use_dora": dora, "target_modules": ["q_proj", "down_proj"]}
    for name, seed in (("one", 1), ("two", 2)):
        oracle.save(tiny.shake(oracle.made_by_peft(base, **fields), seed=seed), tmp_path / name)
    theirs = oracle.read_by_peft(base, tmp_path / "one")
    oracle.quietly(theirs.load_adapter, str(tmp_path / "two"), "two")
    oracle.quietly(theirs.base_model.set_adapter, ["default", "two"])
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")
    ours.load_adapter(tmp_path / "two", "two")
    ours.base_model.set_adapter(["default", "two"])
    x = tiny.ids()
    with torch.no_grad():
        together = ours(x).logits
        assert_close(together, theirs(x).logits, **TIGHT)
        ours.merge_adapter()
        assert_close(ours(x).logits, together, **TIGHT)


def test_bias_keys_follow_peft(tmp_path):
    base = tiny.Stack()
    ours = veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["first"], bias="all"))
    resolution = ours.get_base_model()._veneer_overlay.resolutions["default"]
    assert bias_key(resolution, "first.bias") == "base_model.model.first.base_layer.bias"
    assert bias_key(resolution, "norm.bias") == "base_model.model.norm.bias"

"""Initialisations on a whole model: the base is never lost, and files are plain LoRA, or what PEFT writes."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.errors import AdapterFileError, AttachError, ConfigError
from veneer.model.files import read_checked
from veneer.model.tensors import adapter_tensors, copy_tensors

TIGHT = {"rtol": 1e-4, "atol": 1e-5}
FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
STARTS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "loftq"]
REPEATABLE = ["pissa", "olora"]


def adapted(**fields):
    return veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**{**FIELDS, **fields}))


def answer(model):
    with torch.no_grad():
        return model(tiny.ids()).logits


def assert_base_is_whole(model):
    fresh = tiny.llama().state_dict()
    found = getattr(model, "bare", model).state_dict()
    for name, value in fresh.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("start", STARTS)
def test_it_starts_as_the_base_and_the_base_comes_back(start):
    model = adapted(init_lora_weights=start)
    expected = answer(tiny.llama())
    if start == "loftq":  # the base is quantised; the adapter makes up for a part of it
        adapter = model.bare.model.layers[0].mlp.down_proj.adapters["default"]
        original = tiny.llama().model.layers[0].mlp.down_proj.weight
        now = model.bare.model.layers[0].mlp.down_proj.weight
        assert not torch.equal(now, original)
        assert (now + adapter.delta(now.shape, now.dtype) - original).norm() < (now - original).norm()
    else:
        assert_close(answer(model), expected, **TIGHT)
    if start != "loftq":
        assert_base_is_whole(model)
    tiny.shake(model)
    assert not torch.allclose(answer(model), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
        assert_base_is_whole(model)
    assert_base_is_whole(model.unload())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_merging_and_unmerging(start, rslora, dora):
    model = tiny.shake(adapted(init_lora_weights=start, use_rslora=rslora, use_dora=dora))
    expected = answer(model)
    model.merge_adapter()
    assert_close(answer(model), expected, **TIGHT)
    model.unmerge_adapter()
    assert torch.equal(answer(model), expected)
    with model.disable_adapter():
        assert_base_is_whole(model)
    assert_close(answer(model.merge_and_unload()), expected, **TIGHT)


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_saved_as_plain_lora_of_twice_the_rank(start, more, tmp_path):
    model = tiny.shake(adapted(init_lora_weights=start, **more))
    expected = answer(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"]) == (8, True)
    assert_close(answer(oracle.read_by_peft(tiny.llama(), tmp_path).eval()), expected, **TIGHT)
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert_close(answer(again), expected, **TIGHT)


@pytest.mark.parametrize("start", REPEATABLE)
def test_saved_as_it_is_for_readers_that_start_again(start, tmp_path):
    model = tiny.shake(adapted(init_lora_weights=start))
    expected = answer(model)
    model.save_pretrained(tmp_path, convert_mutated_init=False)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"]) == (4, start)
    assert_close(answer(oracle.read_by_peft(tiny.llama(), tmp_path).eval()), expected, **TIGHT)
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert_close(answer(again), expected, **TIGHT)
    assert_base_is_whole(again.unload())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("start", REPEATABLE)
def test_what_peft_saved_unconverted_loads_and_trains_alike(start, dora, tmp_path):
    theirs = tiny.shake(oracle.made_by_peft(tiny.llama(), **FIELDS, init_lora_weights=start, use_dora=dora)).eval()
    oracle.save(theirs, tmp_path)
    ours = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert_close(answer(ours), answer(theirs), **TIGHT)
    for model in (theirs, ours):
        model(tiny.ids()).logits.square().mean().backward()
    by_storage = {p.data_ptr(): p.grad for p in ours.bare.parameters() if p.requires_grad}
    tensors = adapter_tensors(ours.bare, "default")
    for key, gradient in oracle.gradients(theirs).items():
        assert_close(by_storage[tensors[key].data_ptr()], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora"])
def test_a_checkpoint_restores_a_run_bit_for_bit(start, tmp_path):
    model = tiny.shake(adapted(init_lora_weights=start))
    expected = {key: value.clone() for key, value in adapter_tensors(model.bare, "default").items()}
    model.save_pretrained(tmp_path)
    other = adapted(init_lora_weights=start)
    copy_tensors(other.bare, "default", read_checked(other.bare, "default", tmp_path))
    found = adapter_tensors(other.bare, "default")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_several_starts_stand_side_by_side():
    """In PEFT the second one starts from the base the first one has left (#2184)."""
    model = adapted(init_lora_weights="pissa")
    model.add_adapter("other", veneer.LoraConfig(**{**FIELDS, "init_lora_weights": "olora"}))
    model.add_adapter("plain", veneer.LoraConfig(**FIELDS))
    expected = answer(tiny.llama())
    for name in ("default", "other", "plain"):
        model.set_adapter(name)
        assert_close(answer(model), expected, **TIGHT)
    assert_base_is_whole(model)


def test_loftq_beside_others():
    model = adapted()
    tiny.shake(model)
    plain = answer(model)
    model.add_adapter("quantised", veneer.LoraConfig(**{**FIELDS, "init_lora_weights": "loftq"}))
    assert torch.equal(answer(model), plain)
    model.set_adapter("quantised")
    with_q = answer(model)
    assert not torch.equal(with_q, plain)
    model.merge_adapter(["quantised"])
    assert_close(answer(model), with_q, **TIGHT)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(answer(model), plain)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["quantised"])
    assert_close(answer(merged), with_q, **TIGHT)
    model.delete_adapter("quantised")
    assert torch.equal(answer(model), plain)


def test_loftq_is_saved_against_the_base_it_made(tmp_path):
    model = tiny.shake(adapted(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 2}))
    expected = answer(model)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert_close(answer(again), expected, **TIGHT)
    assert_base_is_whole(again.unload())


def test_mica_trains_a_alone(tmp_path):
    model = adapted(init_lora_weights="mica")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith("lora_A") for name in trained)
    model.add_adapter("other", veneer.LoraConfig(**FIELDS))
    model.set_adapter("other")
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    tiny.shake(model)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    assert_close(answer(oracle.read_by_peft(tiny.llama(), tmp_path).eval()), answer(model), **TIGHT)


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, ConfigError, "model.layers.0.self_attn.q_proj"),
        ({"init_lora_weights": "pissa", "target_modules": ["embed_tokens"]}, AttachError, "starts from a matrix"),
        ({"init_lora_weights": "pissa", "r": 33}, ConfigError, "q_proj"),
        ({"init_lora_weights": "corda"}, ConfigError, "call preprocess_corda"),
        ({"init_lora_weights": "lora_ga"}, ConfigError, "call preprocess_loraga"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*rank above")
def test_what_cannot_start_is_refused_and_nothing_changes(fields, error, why):
    base = tiny.llama()
    with pytest.raises(error, match=why):
        veneer.get_peft_model(base, veneer.LoraConfig(**{**FIELDS, **fields}))
    assert type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert all(p.requires_grad for p in base.parameters())
    assert_base_is_whole(base)


def test_what_came_from_chance_is_not_saved_unconverted(tmp_path):
    model = adapted(init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterFileError, match="came from data or chance"):
        model.save_pretrained(tmp_path / "out", convert_mutated_init=False)
    assert not (tmp_path / "out").exists()

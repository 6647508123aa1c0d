"""Changing a scale by asking for it, and what happens if it is changed in another way."""

import copy
import json

import peft
import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from parity.oracle import read_by_peft
from veneer.errors import AdapterFileError, AdapterNameError, ArgumentError, ConfigError, MergeError, VeneerWarning
from veneer.storage.header import read_header

FIELDS = {
    "r": 4,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "alpha_pattern": {"v_proj": 2},
    "rank_pattern": {"q_proj": 2},
}
X = tiny.ids()
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model() -> veneer.PeftModel:
    return tiny.shake(veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS))).eval()


@pytest.fixture
def theirs(model, tmp_path) -> peft.PeftModel:
    model.save_pretrained(tmp_path / "a")
    return read_by_peft(tiny.llama(), tmp_path / "a")


def each_layer(model, call, *args) -> None:
    for module in model.modules():
        if hasattr(module, call) and not isinstance(module, veneer.PeftModel | veneer.LoraModel):
            getattr(module, call)(*args)


@pytest.mark.parametrize("scale", [0, 0.5, 1, 3.0, -1])
def test_set_scale_is_pefts(model, theirs, scale):
    for path in (model, model.base_model):
        path.set_scale("default", scale)
        each_layer(theirs, "set_scale", "default", scale)
        assert_close(model(X).logits, theirs(X).logits)
    if scale == 0:
        assert torch.equal(model(X).logits, tiny.llama()(X).logits)


def test_layers_scale_and_unscale_as_pefts(model, theirs):
    steps = [("scale_layer", 3), ("scale_layer", 0.5), ("unscale_layer", 2), ("set_scale", "default", 7)]
    for call, *args in [*steps, ("set_scale", "other", 2), ("unscale_layer",)]:
        each_layer(model, call, *args)
        each_layer(theirs, call, *args)
        assert_close(model(X).logits, theirs(X).logits)
    layer = model.bare.model.layers[0].self_attn.q_proj
    assert layer.adapters["default"].scale == 8.0
    assert not layer.adapters["default"].is_rescaled()


def test_rescaling_within_a_block_is_pefts(model, theirs):
    from peft.helpers import rescale_adapter_scale

    before = model(X).logits
    with veneer.rescale_adapter_scale(model, 0.5), rescale_adapter_scale(theirs, 0.5):
        assert_close(model(X).logits, theirs(X).logits)
        with veneer.rescale_adapter_scale(model, 3), rescale_adapter_scale(theirs, 3):
            assert_close(model(X).logits, theirs(X).logits)
        assert_close(model(X).logits, theirs(X).logits)
    assert torch.equal(model(X).logits, before)


def test_rescaling_ends_with_an_error(model):
    before = model(X).logits
    with pytest.raises(ZeroDivisionError), veneer.rescale_adapter_scale(model, 5):
        raise ZeroDivisionError
    assert torch.equal(model(X).logits, before)


def test_rescaling_in_place_and_every_adapter():
    base = veneer.inject_adapter_in_model(veneer.LoraConfig(**FIELDS, init_lora_weights=False), tiny.llama())
    handle = veneer.LoraModel(base)
    handle.add_adapter("b", veneer.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    handle.set_adapter(["default", "b"])
    with veneer.rescale_adapter_scale(base, 0):
        assert torch.equal(base(X).logits, tiny.llama()(X).logits)
    handle.set_scale("b", 0)
    handle.set_scale("default", 0)
    assert torch.equal(base(X).logits, tiny.llama()(X).logits)


def test_a_merge_takes_the_scale_in_use(model):
    model.set_scale("default", 0.25)
    expected = model(X).logits
    model.merge_adapter()
    assert_close(model(X).logits, expected)
    with pytest.raises(MergeError, match="unmerge it first"):
        model.set_scale("default", 1)
    with pytest.raises(MergeError, match="unmerge it first"), veneer.rescale_adapter_scale(model, 2):
        pass
    layer = model.bare.model.layers[0].self_attn.q_proj
    for call in (lambda: layer.set_scale("default", 2), lambda: layer.scale_layer(2), layer.unscale_layer):
        with pytest.raises(MergeError, match="call unmerge_adapter"):
            call()
    model.unmerge_adapter()
    assert torch.equal(model(X).logits, expected)


@pytest.mark.parametrize("value", ["2", None, True, float("nan"), float("inf"), [2]])
def test_what_is_no_number_is_a_type_error(model, value):
    before = model(X).logits
    layer = model.bare.model.layers[0].self_attn.q_proj
    with pytest.raises(ArgumentError):
        model.set_scale("default", value)
    with pytest.raises(TypeError), veneer.rescale_adapter_scale(model, value):
        pass
    with pytest.raises(ArgumentError):
        layer.scale_layer(value)
    assert torch.equal(model(X).logits, before)


def test_names_and_models_that_are_wrong(model):
    with pytest.raises(AdapterNameError, match="did you mean 'default'"):
        model.set_scale("defualt", 2)
    with pytest.raises(ValueError, match="no adapter"), veneer.rescale_adapter_scale(tiny.Stack(), 2):
        pass
    with pytest.raises(ArgumentError, match="divided by 0"):
        model.bare.model.layers[0].self_attn.q_proj.unscale_layer(0)


def test_a_file_describes_the_trained_scale(model, tmp_path):
    trained = model(X).logits
    model.save_pretrained(tmp_path / "before")
    model.set_scale("default", 3)
    with pytest.warns(VeneerWarning, match="is rescaled just now, and that is not saved"):
        model.save_pretrained(tmp_path / "scaled")
    before, scaled = tmp_path / "before", tmp_path / "scaled"
    assert (before / "adapter_config.json").read_bytes() == (scaled / "adapter_config.json").read_bytes()
    assert read_header(before / WEIGHTS).metadata == read_header(scaled / WEIGHTS).metadata  # with the checksum
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path / "scaled")
    assert torch.equal(again(X).logits, trained)


def test_gradients_follow_the_scale(model):
    with veneer.rescale_adapter_scale(model, 2):
        model(X).logits.sum().backward()
    doubled = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin.set_scale("default", 2)
    twin(X).logits.sum().backward()
    assert doubled
    assert all(torch.equal(p.grad, doubled[name]) for name, p in twin.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("change", [{"lora_alpha": 32}, {"alpha_pattern": {"q_proj": 1}}, {"use_rslora": True}])
def test_changing_the_config_in_use_points_to_set_scale(model, change):
    (name, value), *_ = change.items()
    with pytest.raises(ConfigError, match=rf"{name} cannot be changed[\s\S]*call set_scale\(adapter_name, factor\)"):
        setattr(model.peft_config["default"], name, value)


def test_an_alpha_changed_after_training_is_explained(model, tmp_path):
    """Rank 4, alpha 16, then 32 before the next epoch: what happens, why it is dangerous, and what to do instead."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 32}))
    with pytest.raises(AdapterFileError) as caught:
        veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    text = str(caught.value)
    for part in (
        "lora_alpha: trained with 16, the config says 32",
        "twice the influence it was trained to have",
        "can make it unstable",
        "Put the recorded setting back",
        "set_scale(adapter_name, factor)",
        "for another lora_alpha train a new adapter",
    ):
        assert part in text

"""What a model says about its adapters, against what PEFT says."""

import copy
from dataclasses import asdict, fields

import peft
import pytest
import torch
from torch import nn

import tiny
import veneer
from parity.oracle import made_by_peft, quietly
from veneer.errors import AdapterNameError

FIRST = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
SECOND = {"r": 2, "target_modules": ["v_proj", "up_proj"]}


def pair(base: nn.Module, **fields) -> tuple[veneer.PeftModel, peft.PeftModel]:
    """The same two adapters, ours and PEFT's."""
    theirs = made_by_peft(base, **{**FIRST, **fields})
    quietly(theirs.add_adapter, "second", peft.LoraConfig(**SECOND))
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**{**FIRST, **fields}))
    ours.add_adapter("second", veneer.LoraConfig(**SECOND))
    return ours, theirs


def pefts_fields(status) -> dict:
    """Without the fields that PEFT does not have."""
    return {name: value for name, value in asdict(status).items() if name not in ("path", "paths")}


def same_layers(ours: nn.Module, theirs: nn.Module) -> bool:
    return list(map(pefts_fields, veneer.get_layer_status(ours))) == list(map(asdict, peft.get_layer_status(theirs)))


def test_the_fields_are_pefts_and_the_path():
    for name, own in (("TunerLayerStatus", "path"), ("TunerModelStatus", "paths")):
        theirs = [f.name for f in fields(getattr(peft.peft_model, name))]
        assert [f.name for f in fields(getattr(veneer, name))] == [*theirs, own]


def test_the_path_of_each_layer_shows():
    base = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).half())
    base[2].forward = base[2].forward  # as accelerate leaves it
    model = veneer.get_peft_model(
        base, veneer.LoraConfig(r=2, target_modules=["0", "1", "2", "4"], modules_to_save=["3"])
    )
    assert [layer.path for layer in model.get_layer_status()] == [
        "fast",
        "plain: the layer is embedding",
        "fast",
        "",
        "plain: float32 factors on a float16 weight",
    ]
    assert model.get_model_status().paths == {
        "fast": 2,
        "plain: the layer is embedding": 1,
        "plain: float32 factors on a float16 weight": 1,
    }
    model.add_adapter("second", veneer.LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    assert model.get_layer_status()[0].path == "plain: 2 adapters act at once"
    assert model.get_layer_status()[2].path == "fast"


def test_a_peft_model():
    ours, theirs = pair(tiny.llama())
    assert same_layers(ours, theirs)
    assert pefts_fields(ours.get_model_status()) == asdict(theirs.get_model_status())
    assert ours.get_layer_status() == veneer.get_layer_status(ours)


def test_switching_shows():
    ours, theirs = pair(tiny.llama(), modules_to_save=None)
    for model in (ours, theirs):
        model.set_adapter("second")
    assert same_layers(ours, theirs)
    assert pefts_fields(ours.get_model_status()) == asdict(theirs.get_model_status())


def test_disabling_shows():
    ours, theirs = pair(tiny.llama())
    with ours.disable_adapter(), theirs.disable_adapter():
        assert [layer.enabled for layer in ours.get_layer_status()] == [False] * 7
        assert [layer.enabled for layer in theirs.get_layer_status()] == [False] * 7
        assert ours.get_model_status().enabled is False
    assert ours.get_model_status().enabled is True


def test_merging_shows():
    config = {"r": 2, "target_modules": ["q_proj"]}
    theirs = made_by_peft(tiny.llama(), **config)
    ours = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**config))
    for model in (ours, theirs):
        model.merge_adapter()
    assert same_layers(ours, theirs)
    assert ours.get_model_status().merged_adapters == ["default"]


def test_saved_modules_are_not_irregular():
    """In PEFT they do not know about merging, nor which adapter is active if it has no copy of them."""
    ours, theirs = pair(tiny.llama())
    ours.merge_adapter()
    theirs.merge_adapter()
    assert ours.get_model_status().merged_adapters == ["default"]
    assert theirs.get_model_status().merged_adapters == "irregular"
    for model in (ours, theirs):
        quietly(model.unmerge_adapter)
        model.set_adapter("second")
    assert ours.get_model_status().active_adapters == ["second"]
    assert theirs.get_model_status().active_adapters == "irregular"


def test_a_lora_model():
    ours, theirs = pair(tiny.llama())
    assert same_layers(ours.base_model, theirs.base_model)
    assert veneer.get_model_status(ours.base_model) == ours.get_model_status()


def test_a_model_adapted_in_place():
    config = {"r": 2, "target_modules": ["q_proj"]}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), tiny.llama())
    ours = veneer.inject_adapter_in_model(veneer.LoraConfig(**config), tiny.llama())
    assert same_layers(ours, theirs)
    mine, other = veneer.get_model_status(ours), peft.get_model_status(theirs)
    assert mine.peft_types == {"default": "LORA"}
    assert other.peft_types == {}
    assert {**pefts_fields(mine), "peft_types": {}} == asdict(other)


def test_trained_rows_show():
    config = veneer.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    first = veneer.get_layer_status(veneer.get_peft_model(tiny.llama(), config))[0]
    assert (first.name, first.module_type) == ("model.model.embed_tokens", "TrainableTokensLayer")
    assert first.requires_grad == {"default": True}


def test_a_part_of_a_model():
    whole = nn.ModuleDict({"head": nn.Linear(2, 2), "inner": tiny.Stack()})
    veneer.inject_adapter_in_model(veneer.LoraConfig(target_modules=["first"]), whole["inner"])
    assert [layer.name for layer in veneer.get_layer_status(whole)] == ["inner.first"]
    other = nn.ModuleList([whole["inner"], copy.deepcopy(whole["inner"])])
    with pytest.raises(AdapterNameError, match="Several parts of ModuleList"):
        veneer.get_layer_status(other)


def test_a_compiled_model():
    model = veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"]))
    assert veneer.get_model_status(torch.compile(model, backend="eager")).num_adapter_layers == 1


def test_irregular_gradients():
    ours, theirs = pair(tiny.llama())
    ours.bare.model.layers[0].self_attn.q_proj.adapters["default"].lora_A.requires_grad_(False)
    theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].requires_grad_(False)
    assert same_layers(ours, theirs)
    assert ours.get_model_status().requires_grad == {"default": "irregular", "second": False}
    assert pefts_fields(ours.get_model_status()) == asdict(theirs.get_model_status())


@pytest.mark.parametrize("status", [veneer.get_layer_status, veneer.get_model_status])
def test_without_an_adapter(status):
    with pytest.raises(ValueError, match="Stack has no adapter"):
        status(tiny.Stack())
    model = veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"]))
    model.unload()
    with pytest.raises(AdapterNameError, match="no adapter"):
        status(model)

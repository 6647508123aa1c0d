"""Adapters on a transformers model in place."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file

import tiny
import veneer
from veneer.errors import AdapterFileError
from veneer.integrations.adapted_model import AdaptedModel
from veneer.integrations.transformers import add_adapter, load_adapter

CONFIG = veneer.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.fixture
def model():
    base = tiny.llama()
    add_adapter(base, CONFIG)
    return base


def test_the_model_stays_what_it_was(model):
    from transformers import LlamaForCausalLM, PreTrainedModel

    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.active_adapters() == ["default"]
    assert model.peft_config["default"].r == 8


def test_its_own_saving_writes_an_adapter(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 8
    again = tiny.llama()
    load_adapter(again, tmp_path)
    assert torch.equal(again(tiny.ids()).logits, model(tiny.ids()).logits)
    facade = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(facade(tiny.ids()).logits, model(tiny.ids()).logits)


def test_disabling_and_enabling(model):
    with_adapter = model(tiny.ids()).logits
    model.disable_adapters()
    assert torch.equal(model(tiny.ids()).logits, tiny.llama()(tiny.ids()).logits)
    model.enable_adapters()
    assert torch.equal(model(tiny.ids()).logits, with_adapter)


def test_one_adapter_is_saved_at_a_time(model, tmp_path):
    add_adapter(model, CONFIG, "b")
    model.set_adapter(["default", "b"])
    with pytest.raises(AdapterFileError, match="2 are active"):
        model.save_pretrained(tmp_path / "x")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model, clone):
    twin = clone(model)
    assert isinstance(twin, AdaptedModel)
    assert torch.equal(twin(tiny.ids()).logits, model(tiny.ids()).logits)


def test_with_its_last_adapter_a_model_gets_its_class_back(model):
    from veneer.model.merge import remove_all

    remove_all(model)
    assert type(model) is type(tiny.llama())


@pytest.mark.parametrize("enable", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing_is_protected_however_it_is_switched_on(model, enable):
    from veneer.layers.routed_checkpoint import RoutedCheckpoint

    getattr(model, enable)()
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert any(functions)
    assert all(isinstance(f, RoutedCheckpoint) for f in functions if f is not None)

"""Dtypes before and during training, against what PEFT makes of the same model."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from parity.oracle import quietly
from veneer.errors import AdapterFileError, AttachError, ConfigError, VeneerWarning

X = tiny.ids()


class Packed(nn.Parameter):
    """A stand-in for bitsandbytes' 4-bit weights, known by their class's name."""


Packed.__name__ = "Params4bit"


def quantised(**marks) -> nn.Module:
    """A half-precision model that says it is quantised, with one packed weight and one of 8 bits."""
    model = tiny.llama(dtype=torch.bfloat16)
    for name, value in marks.items():
        setattr(model, name, value)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight = Packed(layer.self_attn.o_proj.weight.detach(), requires_grad=False)
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    return model


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


MARKS = [
    {"is_loaded_in_8bit": True},
    {"is_loaded_in_4bit": True},
    {"quantization_method": "gptq"},
    {"quantization_method": "torchao"},
    {"hqq_quantized": True},
]


@pytest.mark.parametrize("marks", MARKS, ids=str)
def test_quantised_models_as_by_peft(marks):
    ours, theirs = quantised(**marks), quantised(**marks)
    assert veneer.prepare_model_for_kbit_training(ours) is ours
    quietly(peft.prepare_model_for_kbit_training, theirs)
    assert dtypes(ours) == dtypes(theirs)
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.is_activation_checkpointing
    assert ours.model.embed_tokens(X).requires_grad == theirs.model.embed_tokens(X).requires_grad is True


def test_only_plain_halves_become_float32():
    model = veneer.prepare_model_for_kbit_training(quantised(is_loaded_in_4bit=True))
    layer = model.model.layers[0]
    assert layer.self_attn.o_proj.weight.dtype == torch.bfloat16
    assert layer.mlp.up_proj.weight.dtype == torch.int8
    assert layer.input_layernorm.weight.dtype == model.lm_head.weight.dtype == torch.float32


def test_checkpointing_is_optional_and_has_options():
    model = veneer.prepare_model_for_kbit_training(quantised(is_loaded_in_8bit=True), use_gradient_checkpointing=False)
    assert not model.is_activation_checkpointing
    for reentrant in (True, False):
        options = {"use_reentrant": reentrant}
        ours, theirs = quantised(is_loaded_in_8bit=True), quantised(is_loaded_in_8bit=True)
        veneer.prepare_model_for_kbit_training(ours, gradient_checkpointing_kwargs=options)
        quietly(peft.prepare_model_for_kbit_training, theirs, gradient_checkpointing_kwargs=options)
        functions = [one.model.layers[0]._gradient_checkpointing_func for one in (ours, theirs)]
        assert [function.keywords for function in functions] == [options, options]
        assert ours.model.embed_tokens(X).requires_grad == theirs.model.embed_tokens(X).requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_was_prepared_trains(reentrant):
    model = tiny.llama(dtype=torch.bfloat16)
    model.is_loaded_in_8bit = True
    veneer.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    adapted, plain = (
        veneer.get_peft_model(base, veneer.LoraConfig(r=2), generator=torch.Generator().manual_seed(1)).train()
        for base in (model, tiny.llama(dtype=torch.bfloat16).float())
    )
    for one in (adapted, plain):
        tiny.shake(one)
        one(X, labels=X).loss.backward()
    mine = [p.grad for p in adapted.parameters() if p.requires_grad]
    expected = [p.grad for p in plain.parameters() if p.requires_grad]
    assert len(mine) == 28
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_plain_model_is_noticed():
    model = tiny.llama(dtype=torch.float16)
    with pytest.warns(VeneerWarning, match="not quantised"):
        veneer.prepare_model_for_kbit_training(model)
    assert set(dtypes(model).values()) == {torch.float32}
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("bare", [True, False])
def test_after_attaching_it_is_refused(bare):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig())
    with pytest.raises(AttachError, match="prepare it before"):
        veneer.prepare_model_for_kbit_training(model.bare if bare else model)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_as_by_peft(dtype):
    ours = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(), autocast_adapter_dtype=False)
    expected = {name: torch.float32 if p.requires_grad else dtype for name, p in ours.named_parameters()}
    veneer.cast_mixed_precision_params(ours, dtype)
    assert dtypes(ours) == expected
    theirs = tiny.llama()
    theirs.lm_head.requires_grad_(True)
    theirs.model.requires_grad_(False)
    mine = copy.deepcopy(theirs)
    peft.cast_mixed_precision_params(theirs, dtype)
    veneer.cast_mixed_precision_params(mine, dtype)
    assert dtypes(mine) == dtypes(theirs)


def test_integers_and_packed_weights_stay():
    model = quantised().requires_grad_(False)
    veneer.cast_mixed_precision_params(model, torch.float16)
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == torch.int8
    assert layer.self_attn.o_proj.weight.dtype == torch.bfloat16
    assert layer.self_attn.q_proj.weight.dtype == torch.float16
    with pytest.raises(ConfigError, match="must be torch.float16"):
        veneer.cast_mixed_precision_params(model, torch.int8)


WAYS = {
    "load": lambda model, folder: veneer.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False),
    "set": lambda model, folder: veneer.set_peft_model_state_dict(model, veneer.load_peft_weights(folder)),
    "swap": veneer.hotswap_adapter,
}


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}])
@pytest.mark.parametrize("way", WAYS)
def test_values_that_would_be_infinite_in_the_model_are_refused(way, fields, tmp_path):
    config = veneer.LoraConfig(target_modules=["q_proj"], **fields)
    large = veneer.get_peft_model(tiny.llama(), config)
    with torch.no_grad():
        for parameter in large.parameters():
            if parameter.requires_grad:
                parameter.fill_(1e5)
    large.save_pretrained(tmp_path)
    model = tiny.llama(dtype=torch.float16)
    if way != "load":
        model = veneer.get_peft_model(model, config, autocast_adapter_dtype=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match="too large for the model"):
        WAYS[way](model, tmp_path)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_weights_in_4_bits_are_counted_number_by_number(storage):
    """Two of them lie in a byte, and several bytes may lie in one element of what is kept."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    models = []
    for make in (veneer.get_peft_model, peft.get_peft_model):
        config = (veneer if make is veneer.get_peft_model else peft).LoraConfig(r=2, target_modules=["0"])
        base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, quant_storage=storage), nn.Linear(32, 4))
        models.append(make(base.to("cpu"), config))
    ours, theirs = (model.get_nb_trainable_parameters() for model in models)
    assert ours == theirs == (2 * (64 + 32), 2 * (64 + 32) + 64 * 32 + 32 + 32 * 4 + 4)

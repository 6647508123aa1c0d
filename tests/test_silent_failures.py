"""What PEFT 0.21 does wrongly without a word, each verified there once: here the right answer, or a clear error."""

import copy
import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from veneer.errors import AdapterFileError, AdapterNameError, ConfigError, MergeError, TargetError, VeneerError

FIELDS = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted(base: nn.Module | None = None, **fields) -> veneer.PeftModel:
    base = tiny.llama() if base is None else base
    return tiny.shake(veneer.get_peft_model(base, veneer.LoraConfig(**{**FIELDS, **fields})))


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids()).logits


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    data = {k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v != "REMOVED"}
    file.write_text(json.dumps(data))


def edit_weights(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused_untouched(base: nn.Module, folder, why: str, error: type[VeneerError] = AdapterFileError) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(error, match=why):
        veneer.PeftModel.from_pretrained(base, folder)
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


# Names that mean nothing.


def test_one_misspelt_target_of_two():
    with pytest.raises(TargetError, match="'v_prjo' matches nothing; did you mean v_proj"):
        adapted(target_modules=["q_proj", "v_prjo"])


def test_a_layer_that_does_not_exist():
    with pytest.raises(TargetError, match="no targeted layer has index 99"):
        adapted(layers_to_transform=[0, 99])


def test_layer_numbers_beside_a_full_path():
    with pytest.raises(TargetError, match="no targeted layer has index 0"):
        adapted(target_modules=["model.layers.1.self_attn.q_proj"], layers_to_transform=[0])


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing(field):
    with pytest.raises(TargetError, match="'q_prj' matches nothing; did you mean q_proj"):
        adapted(**{field: {"q_prj": 2}})


def test_modules_to_save_ends_at_a_dot():
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**{**FIELDS, "modules_to_save": ["lm_head"]}))
    assert [path for path, module in model.bare.named_modules() if path.endswith("modules_to_save")] == [
        "lm_head.modules_to_save"
    ]
    with pytest.raises(TargetError, match="'head' matches nothing"):
        adapted(modules_to_save=["head"])


def test_modules_to_save_as_one_string():
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**{**FIELDS, "modules_to_save": "lm_head"}))
    assert model.peft_config["default"].modules_to_save == ["lm_head"]


# Values that cannot be meant.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_dropout", float("nan")),
        ("lora_dropout", -0.1),
        ("use_rslora", "false"),
        ("r", 10**8),
    ],
)
def test_a_value_that_cannot_be_meant(field, value):
    with pytest.raises(ConfigError, match=field):
        veneer.LoraConfig(**{field: value})


def test_a_regular_expression_that_would_not_end():
    start = time.monotonic()
    with pytest.raises(ConfigError, match="takes over 1 s"):
        adapted(target_modules="(.{1,30}){1,30}[!?]")
    assert time.monotonic() - start < 30


def test_alpha_edited_after_the_adapter_was_made():
    model = adapted()
    with pytest.raises(ConfigError, match="lora_alpha cannot be changed"):
        model.peft_config["default"].lora_alpha = 64


def test_a_config_is_not_changed_by_its_use():
    config = veneer.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", lora_bias=False)
    before = copy.deepcopy(config)
    first = veneer.get_peft_model(tiny.bert(), config)
    second = veneer.get_peft_model(tiny.bert(), config)
    assert config == before
    assert first.peft_config["default"] == second.peft_config["default"]


def test_target_modules_are_written_in_order(tmp_path):
    adapted(target_modules={"v_proj", "q_proj", "down_proj", "up_proj"}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert written == sorted(written)


# Files.


def test_a_config_without_alpha(folder):
    edit_config(folder, lora_alpha="REMOVED")
    refused_untouched(tiny.llama(), folder, "lora_alpha: missing", ConfigError)


def test_missing_tensors(folder):
    edit_weights(folder, lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"))
    refused_untouched(tiny.llama(), folder, r"missing .*layers.0.self_attn.q_proj.lora_A.weight")


def test_unexpected_tensors(folder):
    edit_weights(folder, lambda t: t.update({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}))
    refused_untouched(tiny.llama(), folder, "not expected base_model.model.x.lora_A.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_weights_that_are_no_floating_point_numbers(dtype, folder):
    edit_weights(folder, lambda t: t.update({name: value.to(dtype) for name, value in t.items()}))
    refused_untouched(tiny.llama(), folder, "adapters are floating point")


def test_weights_that_are_no_numbers(folder):
    edit_weights(folder, lambda t: next(iter(t.values())).fill_(float("nan")))
    refused_untouched(tiny.llama(), folder, "NaN or infinity")


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.filterwarnings("ignore::veneer.errors.VeneerWarning")
def test_an_adapter_for_a_model_of_another_depth(layers, folder):
    refused_untouched(tiny.llama(layers=layers), folder, "missing|not expected")


def test_a_file_that_holds_base_weights(folder):
    edit_weights(folder, lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}))
    refused_untouched(tiny.llama(), folder, "not expected base_model.model.model.norm.weight")


def test_a_load_that_fails_late_changes_nothing(folder):
    edit_weights(folder, lambda t: t.update({list(t)[-1]: torch.zeros(3, 3)}))
    refused_untouched(tiny.llama(), folder, "wrong shape")


def test_saving_the_base_while_adapters_lie_over_it(tmp_path):
    base = tiny.llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base)
    model.merge_adapter()
    model.get_base_model().save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], value) for name, value in before.items())


# Names of adapters.


@pytest.mark.parametrize("name", ["mlp", "0", "q_proj", "lora_A"])
def test_an_adapter_called_like_a_part_of_the_model(name, tmp_path):
    model = adapted()
    model.add_adapter(name, veneer.LoraConfig(**FIELDS))
    model.set_adapter(name)
    tiny.shake(model, seed=9)
    expected = answer(model)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path / name)
    assert_close(answer(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["/tmp/elsewhere", "../up", "a.b", ""])
def test_a_name_that_would_write_elsewhere(name):
    with pytest.raises(AdapterNameError):
        adapted().add_adapter(name, veneer.LoraConfig(**FIELDS))


def test_merging_an_adapter_that_does_not_exist():
    with pytest.raises(AdapterNameError, match="There is no adapter 'typo'"):
        adapted().merge_and_unload(adapter_names=["typo"])


# Sums.


def test_an_update_too_large_for_the_base():
    model = adapted(tiny.llama(dtype=torch.float16))
    with torch.no_grad():
        model.bare.model.layers[0].mlp.down_proj.adapters["default"].lora_B.fill_(6e4)
    with pytest.raises(MergeError, match="NaN or infinity"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:.*share one weight")
def test_a_tied_head_is_merged_once():
    model = adapted(tiny.llama(tied=True), target_modules=["q_proj", "lm_head"])
    expected = answer(model)
    embedding = model.bare.get_input_embeddings().weight.clone()
    merged = model.merge_and_unload()
    assert_close(answer(merged), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)


def test_weights_that_are_fewer_than_adapters_and_a_name_that_is_taken():
    model = adapted()
    model.add_adapter("other", veneer.LoraConfig(**FIELDS))
    with pytest.raises(ConfigError, match="weights"):
        model.add_weighted_adapter(["default", "other"], [1.0], "both", combination_type="cat")
    with pytest.raises(AdapterNameError, match="There is an adapter 'other' already"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "other", combination_type="cat")


def test_disabling_leaves_frozen_adapters_frozen(folder):
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    with model.disable_adapter():
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_output_projection_of_attention_is_updated_once():
    torch.manual_seed(0)
    base = nn.Sequential()
    base.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = tiny.shake(veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["attention"])))
    x = torch.randn(2, 5, 8)
    found = model.bare.attention(x, x, x)[0]
    merged = model.merge_and_unload()
    assert_close(merged.attention(x, x, x)[0], found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_a_convolution_keeps_its_dilation_and_padding(fields):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3, **fields))
    x = torch.randn(2, 3, 9, 9)
    model = tiny.shake(veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["0"])))
    found = model(x)
    assert_close(model.merge_and_unload()(x), found, rtol=1e-4, atol=1e-5)


def test_dropout_on_an_embedding():
    base = tiny.Stack()
    model = tiny.shake(veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["tokens"], lora_dropout=0.5)))
    x = tiny.ids(20)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))

"""Files with the names of an older version: what is read, what is refused, and what is left alone."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

import former_models
import tiny
import tiny_moe
import veneer
from former_models import LLAVA, MIXTRAL, QWEN
from veneer.cli import app
from veneer.errors import AdapterFileError, AttachError, VeneerWarning
from veneer.integrations.transformers import load_adapter
from veneer.model.from_state import load_adapter_state
from veneer.model.state_dict import load_peft_weights

EXPERTS = {"target_modules": ["q_proj", "w1", "w2", "w3"]}
OLDER = pytest.mark.filterwarnings("ignore:.*older version:veneer.errors.VeneerWarning")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base():
    return tiny_moe.mixtral()


@pytest.fixture
def folder(base, tmp_path):
    return former_models.old_file(base, MIXTRAL, tmp_path / "old", **EXPERTS)


def run(model):
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


def read(base, folder, **options):
    return veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder, **options)


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): value for key, value in tensors.items() if change(key)}, folder / WEIGHTS)


def test_it_is_said_what_became_what(base, folder):
    with pytest.warns(VeneerWarning) as said:
        read(base, folder)
    text = str(said[0].message)
    assert "model.layers.*.block_sparse_moe.experts.*.w3 → model.layers.*.mlp.experts.gate_up_proj" in text
    assert "save the adapter, and the new file has them" in text
    assert "lora_dropout" not in text


@OLDER
def test_the_config_says_the_same_of_todays_names(base, folder):
    config = read(base, folder).peft_config["default"]
    assert config.target_modules == ["q_proj"]
    assert config.target_parameters == ["experts.gate_up_proj", "experts.down_proj"]
    assert (config.r, config.lora_alpha) == (2, 6)
    assert (config.rank_pattern, config.alpha_pattern) == ({"gate_up_proj": 4}, {"gate_up_proj": 12})


@pytest.mark.parametrize("fields", [{"target_modules": ["q_proj"]}, {"target_parameters": tiny_moe.BOTH}])
def test_a_file_of_today_is_left_alone(base, fields, tmp_path):
    model = tiny.shake(veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(r=2, **fields))).eval()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = read(base, tmp_path)
    assert torch.equal(run(again), run(model))


@OLDER
def test_dropout_goes_where_an_adapter_reads_no_input(base, tmp_path):
    folder = former_models.old_file(base, MIXTRAL, tmp_path / "old", **EXPERTS, lora_dropout=0.25)
    with pytest.warns(VeneerWarning, match=r"lora_dropout: 0.25 → 0"):
        model = read(base, folder, is_trainable=True)
    assert model.peft_config["default"].lora_dropout == 0
    other = former_models.old_file(
        former_models.llava(), LLAVA, tmp_path / "b", target_modules=["q_proj"], lora_dropout=0.25
    )
    assert read(former_models.llava(), other).peft_config["default"].lora_dropout == 0.25


@OLDER
def test_it_trains_switches_and_is_swapped_like_any_other(base, folder, tmp_path):
    model = read(base, folder, is_trainable=True).train()
    before = run(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert not torch.equal(run(model), before)

    second = former_models.old_file(base, MIXTRAL, tmp_path / "second", **EXPERTS, use_rslora=True)
    alone = run(read(base, second))
    model.load_adapter(second, "second")
    model.set_adapter("second")
    assert_close(run(model.eval()), alone)
    with model.disable_adapter():
        assert torch.equal(run(model), run(base))
    model.set_adapter("default")
    veneer.hotswap_adapter(model, second, "default")
    assert_close(run(model), alone)
    veneer.hotswap_adapter(model, folder, "default")
    assert_close(run(model), before)
    values, config = load_peft_weights(second), veneer.LoraConfig.from_pretrained(second)
    veneer.hotswap_adapter_from_state_dict(model, values, "default", config)
    assert_close(run(model), alone)


@OLDER
def test_values_in_memory_find_their_places(base, folder):
    model = read(base, folder, is_trainable=True).eval()
    expected, values = run(model), load_peft_weights(folder)
    tiny.shake(model, seed=5)
    assert not torch.allclose(run(model), expected)
    assert veneer.set_peft_model_state_dict(model, values) == ([], [])
    assert_close(run(model), expected)


@OLDER
def test_in_place(base, folder):
    expected, model, other = run(read(base, folder)), copy.deepcopy(base), copy.deepcopy(base)
    load_adapter(model, folder)
    assert torch.equal(run(model), expected)
    load_adapter_state(other, "default", veneer.LoraConfig.from_pretrained(folder), load_peft_weights(folder))
    assert torch.equal(run(other), expected)


@OLDER
def test_below_another_module(base, folder):
    """transformers' model in one that is not: names begin with where it is."""

    class Whole(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **kwargs):
            return self.inner(**kwargs)

    expected = run(read(base, folder))
    edit_weights(folder, lambda key: key.replace("base_model.model.", "base_model.model.inner."))
    assert torch.equal(run(read(Whole(base), folder)), expected)


@OLDER
def test_a_block_that_was_trained_in_full(base, tmp_path):
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["block_sparse_moe"]}
    folder = former_models.old_file(base, MIXTRAL, tmp_path / "old", **fields)
    model = read(base, folder)
    assert model.peft_config["default"].modules_to_save == ["mlp"]
    values = load_file(folder / WEIGHTS)
    moe = model.get_base_model().model.layers[1].mlp.modules_to_save["default"]
    start = "base_model.model.model.layers.1.block_sparse_moe.experts.2"
    both = torch.cat([values[f"{start}.w1.weight"], values[f"{start}.w3.weight"]])
    assert torch.equal(moe.experts.gate_up_proj[2], both)
    edit_weights(folder, lambda key: "" if "0.block_sparse_moe.experts.3.w3" in key else key)
    with pytest.raises(AdapterFileError, match="only some of the weights that lie in model.layers.0.mlp.experts.gate_"):
        read(base, folder)


def test_half_of_the_names_lead_nowhere(base, folder):
    edit_weights(folder, lambda key: key.replace("w2", "w9").replace("q_proj", "quark"))
    with pytest.raises(AdapterFileError, match="older version of MixtralForCausalLM, and not all") as raised:
        read(base, folder)
    text = str(raised.value)
    assert "not in the model    model.layers.*.block_sparse_moe.experts.*.w9" in text
    assert "not in the model    model.layers.*.self_attn.quark" in text
    assert "found as            model.layers.*.mlp.experts.gate_up_proj, once model.layers.*.block_sparse_moe" in text


def test_names_that_nobody_knows_are_an_ordinary_mistake(base, folder):
    edit_weights(folder, lambda key: key.replace("block_sparse_moe", "moe") if "q_proj" not in key else key)
    edit_weights(folder, lambda key: key.replace(".experts.", ".parts."))
    wrong = pytest.raises(AdapterFileError, match="does not fit this model and adapter_config.json")
    with pytest.warns(VeneerWarning, match="w1"), wrong:
        read(base, folder)


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        ("0.w1.lora_B", "is missing, its part of model.layers.0.mlp.experts.gate_up_proj needs"),
        ("2.w2.lora_A", "missing"),
    ],
)
def test_a_factor_is_missing(base, folder, gone, text):
    edit_weights(folder, lambda key: "" if f"layers.0.block_sparse_moe.experts.{gone}" in key else key)
    with pytest.raises(AdapterFileError, match=text):
        read(base, folder)


def test_a_rank_that_the_config_does_not_say(base, folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": {"w1": 3}}))
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS)  # without the note of what it was trained with
    with pytest.raises(AdapterFileError, match=r"w1.lora_A.weight has \[2, 16\], its part of .* needs \[3, 16\]"):
        read(base, folder)


def test_dora_needs_a_magnitude_for_every_expert(base, tmp_path):
    fields = {"target_modules": r".*experts\.[01]\.w2", "use_dora": True}
    folder = former_models.old_file(base, MIXTRAL, tmp_path, **fields)
    with pytest.raises(AdapterFileError, match="use_dora: 2 matrices in model.layers.0.mlp.experts.down_proj have no"):
        read(base, folder)


def test_a_start_that_cannot_be_made_again(base, tmp_path):
    fields = {"target_modules": ["w2"], "init_lora_weights": "pissa"}
    tree = veneer.get_peft_model(former_models.tree(MIXTRAL.before(base)), veneer.LoraConfig(r=2, **fields))
    tree.save_pretrained(tmp_path, convert_mutated_init=False)
    with pytest.raises(AdapterFileError, match="'pissa' starts from weights which are parts of others"):
        read(base, tmp_path)


def test_a_bias_on_an_expert_has_no_place(base, tmp_path):
    folder = former_models.old_file(base, MIXTRAL, tmp_path, target_modules=["w2"], lora_bias=True)
    with pytest.raises(AdapterFileError, match=r"w2.lora_B.bias belongs to a weight that is a part of"):
        read(base, folder)


def test_values_that_are_rearranged_are_refused(base, folder, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    rules = [WeightConverter(["mlp.experts.*.w2.weight"], ["mlp.experts.down_proj"], [Transpose(0, 1)])]
    known = conversion_mapping.get_checkpoint_conversion_mapping
    more = lambda name: [*rules, *known(name)] if name == "mixtral" else known(name)  # noqa: E731
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", more)
    with pytest.raises(AdapterFileError, match=r"transformers rearranges its values now \(Transpose"):
        read(base, folder)


@OLDER
def test_nothing_changes_when_it_fails(base, folder):
    model = copy.deepcopy(base)
    edit_weights(folder, lambda key: key.replace("w2", "w9"))
    with pytest.raises(AdapterFileError):
        veneer.PeftModel.from_pretrained(model, folder)
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
    assert torch.equal(run(model), run(base))


def test_inspect_shows_what_the_file_says(folder):
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.output for name in ("w1", "q_proj"))


@OLDER
def test_experts_beside_a_shared_one(tmp_path):
    base = tiny_moe.qwen2_moe()
    fields = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    model = read(base, former_models.old_file(base, QWEN, tmp_path, **fields))
    names = {site.name for site in model.get_base_model()._veneer_overlay.resolutions["default"].sites}
    assert {"model.layers.0.mlp.shared_expert.up_proj", "model.layers.0.mlp.experts.gate_up_proj"} <= names


@OLDER
def test_an_adapter_on_layers_that_are_there_already_twice(base, folder):
    model = read(base, folder)
    with pytest.raises(AttachError):
        veneer.PeftModel.from_pretrained(model, folder)

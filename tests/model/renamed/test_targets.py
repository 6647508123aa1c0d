"""New adapters by the names that layers had before."""

import copy
import warnings

import pytest
import torch

import former_models
import tiny
import tiny_moe
import veneer
from parity import oracle
from veneer.errors import TargetError, VeneerWarning
from veneer.model.renamed.targets import with_names_of_today
from veneer.targets import resolve

ALL = ["gate_proj", "up_proj", "down_proj"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def today(base, **fields):
    with pytest.warns(VeneerWarning, match="names layers of an older version"):
        return with_names_of_today(base, veneer.LoraConfig(**{"r": 2, "lora_alpha": 6, **fields}))


def test_it_is_said_what_to_write_instead():
    with pytest.warns(VeneerWarning) as said:
        veneer.get_peft_model(tiny_moe.mixtral(), veneer.LoraConfig(r=2, target_modules=["w1", "w2", "w3", "q_proj"]))
    text = str(said[0].message)
    assert f"target_modules=['q_proj'] and target_parameters={BOTH!r}; write that" in text
    assert "w1 + w3 → experts.gate_up_proj, rank 4, alpha 16" in text


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny_moe.mixtral, ["w1", "w2", "w3"]),
        (tiny_moe.mixtral, ["w2", "gate", "v_proj"]),
        (tiny_moe.mixtral, ["gate"]),
        (tiny_moe.qwen3_moe, ["q_proj", "o_proj", *ALL]),
    ],
)
def test_it_is_the_adapter_that_peft_makes(make, targets, tmp_path):
    base, fields = make(), {"r": 2, "lora_alpha": 6, "target_modules": targets}
    theirs = oracle.made_by_peft(base, **fields)
    with pytest.warns(VeneerWarning, match="older version"):
        ours = tiny.shake(veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**fields))).eval()
    assert {key: value.shape for key, value in veneer.get_peft_model_state_dict(ours).items()} == {
        key: value.shape for key, value in oracle.values(theirs).items()
    }
    config = theirs.peft_config["default"]
    assert set(ours.peft_config["default"].rank_pattern.values()) == set(config.rank_pattern.values())
    assert set(ours.peft_config["default"].alpha_pattern.values()) == set(config.alpha_pattern.values())
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = ours(input_ids=tiny.ids()).logits
        torch.testing.assert_close(oracle.read_by_peft(base, tmp_path).eval()(input_ids=tiny.ids()).logits, expected)


def test_in_place_too():
    base = tiny_moe.mixtral()
    with pytest.warns(VeneerWarning, match="older version"):
        veneer.inject_adapter_in_model(veneer.LoraConfig(r=2, target_modules=["w2"]), base)
    assert base.model.layers[0].mlp.experts.adapters is not None


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_stays(rslora):
    """PEFT doubles alpha with rsLoRA too, where the scale goes by the root of the rank."""
    base = tiny_moe.mixtral()
    config = today(base, target_modules=["w1", "w2", "w3"], use_rslora=rslora)
    with_layers = veneer.get_peft_model(base, config).get_layer_status()
    assert len(with_layers) == 2
    sites = base._veneer_overlay.resolutions["default"].sites
    assert [site.scale for site in sites] == pytest.approx([6 / 2**0.5 if rslora else 3] * 4)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"target_modules": ["w2"], "layers_to_transform": 1}, ["1.mlp.experts.down_proj"]),
        (
            {"target_modules": ["w2"], "layers_to_transform": [0], "layers_pattern": "layers"},
            ["0.mlp.experts.down_proj"],
        ),
        ({"target_modules": ["w2"], "exclude_modules": r".*\.0\.block_sparse_moe.*"}, ["1.mlp.experts.down_proj"]),
        ({"target_modules": r".*block_sparse_moe.*(w1|w2|w3)"}, BOTH),
        ({"target_modules": r"model\.layers\.0\..*w2"}, ["0.mlp.experts.down_proj"]),
        ({"target_modules": ["layers.1.block_sparse_moe.gate"]}, ["1.mlp.gate.weight"]),
    ],
)
def test_what_chooses_among_layers_has_done_so(fields, parameters):
    config = today(tiny_moe.mixtral(), **fields)
    assert (config.target_modules, config.target_parameters) == ([], parameters)
    assert (config.exclude_modules, config.layers_to_transform, config.layers_pattern) == (None, None, None)


def test_patterns_by_former_names():
    fields = {"rank_pattern": {"w2": 3, r"0.*v_proj": 1}, "alpha_pattern": {"w[13]": 12}}
    config = today(tiny_moe.mixtral(), target_modules=["w1", "w2", "w3", "v_proj"], **fields)
    assert config.rank_pattern == {"0.self_attn.v_proj": 1, "gate_up_proj": 4, "down_proj": 3}
    assert config.alpha_pattern == {"gate_up_proj": 24}


def test_experts_beside_a_shared_one_are_meant_too():
    base = tiny_moe.qwen2_moe()
    config = today(base, target_modules=ALL)
    assert (config.target_modules, config.target_parameters) == (ALL, BOTH)


def test_the_prefixes_of_old():
    """A pattern that means no name of today."""
    config = today(former_models.llava(), target_modules=r"language_model\.model\..*[qv]_proj")
    sites = resolve(former_models.llava(), config).sites
    expected = [f"model.language_model.layers.{i}.self_attn.{one}_proj" for i in (0, 1) for one in "qv"]
    assert [site.path for site in sites] == expected


def test_a_pattern_that_leaves_something_out_by_its_name_of_today():
    """Here the vision tower, which was not below `model` before."""
    config = veneer.LoraConfig(r=2, target_modules=r"^(?!model\.vision).*q_proj")
    with warnings.catch_warnings(action="error"):
        assert with_names_of_today(former_models.llava(), config) is config


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": ["w1", "q_proj"]}, "gate_up_proj now, with others, and w1 is only 1 of the 2 parts"),
        ({"target_modules": r".*experts\.0\.w[123]"}, "w1 and w3 of only some of its 4 matrices"),
        ({"target_modules": ["w1", "w3"], "rank_pattern": {"w1": 3}}, "rank_pattern or alpha_pattern differ"),
        ({"target_modules": ["w2"], "lora_dropout": 0.1}, r"no input can be dropped: set lora_dropout=0 \(it is 0.1\)"),
        ({"target_modules": ["w9"]}, "'w9' matches nothing"),
    ],
)
def test_what_cannot_be_followed(fields, text):
    base = tiny_moe.mixtral()
    with pytest.raises(TargetError, match=text):
        veneer.get_peft_model(base, veneer.LoraConfig(r=2, **fields))
    assert not hasattr(base, "_veneer_overlay")


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tiny_moe.mixtral, {"target_modules": ["q_proj"]}),
        (tiny_moe.qwen2_moe, {"target_modules": ["shared_expert.down_proj"]}),
        (tiny_moe.qwen2_moe, {"target_modules": ALL, "target_parameters": BOTH[:1]}),
        (former_models.llava, {"target_modules": ["q_proj"]}),
        (tiny.llama, {"target_modules": r".*q_proj"}),
        (tiny_moe.Block, {"target_modules": ["first"]}),
    ],
)
def test_names_of_today_are_left_alone(make, fields):
    config = veneer.LoraConfig(r=2, **fields)
    with warnings.catch_warnings(action="error"):
        assert with_names_of_today(make(), config) is config

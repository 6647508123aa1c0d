"""What target_parameters and the name of an attention module mean, and what is wrong with them."""

import pytest
import torch
from torch import nn

import tiny_moe
from veneer import LoraConfig
from veneer.errors import AttachError, ConfigError, TargetError
from veneer.model.plan import plan
from veneer.targets import resolve


class Holder(nn.Module):
    """Modules that hold parameters of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.block = tiny_moe.Block()
        self.loose = nn.Parameter(torch.zeros(4, 4))
        self.bank = nn.ParameterList([torch.zeros(4, 4)])
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4)
        self.whole = nn.Module()
        self.whole.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


def found(**fields):
    return resolve(Holder(), LoraConfig(**{"r": 2, **fields}))


def names(**fields):
    return [site.name for site in found(**fields).sites]


def refusal(**fields):
    with pytest.raises(TargetError) as caught:
        found(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["up"], ["block.experts.up"]),
        (["experts.up", "experts.down"], ["block.experts.up", "block.experts.down"]),
        (["experts.down", "block.experts.up"], ["block.experts.up", "block.experts.down"]),
        (["in_proj_weight"], ["attention.in_proj_weight"]),
    ],
)
def test_an_entry_is_a_full_name_or_its_end(entries, expected):
    assert names(target_parameters=entries) == expected


def test_no_module_is_meant_beside_parameters_unless_named():
    for modules in (None, []):
        resolution = found(target_parameters=["experts.up"], target_modules=modules)
        assert [site.name for site in resolution.sites] == ["block.experts.up"]
        assert resolution.target_modules == []
    assert names(target_parameters=["experts.up"], target_modules=["first"]) == ["block.first", "block.experts.up"]


def test_files_nest_the_parameters_of_one_module():
    sites = found(target_parameters=["down", "up", "table"]).sites
    assert [(site.parameter, site.file_path) for site in sites] == [
        ("up", "block.experts.base_layer.base_layer"),
        ("down", "block.experts.base_layer"),
        ("table", "block.experts"),
    ]


def test_an_attention_module_has_two_sites():
    sites = found(target_modules=["attention"], r=4).sites
    assert [(site.name, site.shape, site.file_path) for site in sites] == [
        ("attention.in_proj_weight", (24, 8), "attention"),
        ("attention.out_proj", (8, 8), "attention.base_layer.out_proj"),
    ]
    assert [site.factors for site in sites] == [((4, 8), (24, 4)), ((4, 8), (8, 4))]


@pytest.mark.filterwarnings("ignore:'all-linear' leaves")
def test_every_linear_layer_includes_attention_as_a_whole():
    expected = ["block.first", "block.last", "attention.in_proj_weight", "attention.out_proj"]
    assert names(target_modules="all-linear", exclude_modules=["cross"]) == expected
    assert names(target_modules=["attention", "attention.out_proj"]) == expected[2:]
    resolution = found(target_modules="all-linear", exclude_modules=["cross"])
    assert resolution.target_modules == ["attention", "first", "last"]


def test_sizes_count_every_expert():
    (site,) = found(target_parameters=["experts.up"], r=2, use_dora=True).sites
    assert site.factors == ((6, 4), (6, 6))
    assert site.shape == (18, 4)
    assert site.parameters == 6 * 4 + 6 * 6 + 18


def test_a_rank_above_that_of_one_expert_is_warned_of():
    with pytest.warns(UserWarning, match=r"block.experts.up is 6 × 4, rank 5"):
        found(target_parameters=["experts.up"], r=5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_parameters": ["experts.upp"]}, "'experts.upp' matches nothing; did you mean up (1 layer)?"),
        ({"target_parameters": ["experts"]}, "'experts' is a module; name its parameters: experts.up"),
        ({"target_parameters": ["experts.up", "erts.down"]}, "'erts.down' matches nothing"),
        ({"target_parameters": ["experts.scales"]}, "block.experts.scales cannot be adapted: it has 1 dimension(s)"),
        ({"target_parameters": ["first.weight"]}, "it is the weight of a layer; write target_modules=['first']"),
        ({"target_parameters": ["loose"]}, "loose cannot be adapted: it belongs to the model itself"),
        ({"target_parameters": ["bank.0"]}, "it lies in a ParameterList, which is never called itself"),
        ({"target_parameters": ["attention.out_proj.weight"]}, "name the attention module, of which it is a part"),
        ({"target_parameters": ["up"], "modules_to_save": ["experts"]}, "modules_to_save trains its module in full"),
        ({"target_parameters": ["up"], "modules_to_save": ["block"]}, "modules_to_save trains its module in full"),
        (
            {"target_parameters": ["in_proj_weight"], "target_modules": ["attention"]},
            "attention.in_proj_weight cannot be adapted: target_modules adapts its module already",
        ),
        ({"target_modules": ["cross"]}, "cross cannot be adapted: its kdim or vdim differs from embed_dim"),
        ({"target_modules": ["experts"]}, "name its parameters in target_parameters: up, down, table"),
        ({"target_modules": ["up"]}, "'up' is a parameter, not a layer; write it into target_parameters"),
        (
            {"target_parameters": ["up"], "lora_dropout": 0.1},
            "lora_dropout=0.1: block.experts.up is read",
        ),
        (
            {"target_modules": ["attention"], "lora_dropout": 0.1},
            "attention.in_proj_weight and 1 more is read",
        ),
        ({"target_parameters": ["up"], "bias": "all", "target_modules": ["first"]}, "bias='all' cannot go with"),
        ({"target_parameters": ["up"], "lora_bias": True}, "lora_bias cannot go with block.experts.up"),
        ({"target_parameters": ["up"], "init_lora_weights": "eva"}, "init_lora_weights='eva' measures what goes into"),
        ({"target_parameters": ["up"], "fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"target_parameters": ["up"], "rank_pattern": {"nothing": 2}}, "rank_pattern: 'nothing' matches nothing"),
        (
            {"target_parameters": ["up"], "target_modules": ["0"], "layers_to_transform": [0]},
            "layers_to_transform does not choose among target_parameters",
        ),
        (
            {"target_parameters": ["up"], "exclude_modules": ["experts"]},
            "exclude_modules does not choose among target_parameters (block.experts.up)",
        ),
        (
            {"target_modules": ["attention"], "exclude_modules": ["out_proj"]},
            "attention.out_proj is adapted together with the attention module",
        ),
    ],
)
def test_what_cannot_be_meant_is_said(fields, expected):
    assert expected in refusal(**fields)


def test_patterns_match_the_full_name_of_a_parameter():
    config = LoraConfig(
        target_parameters=["up", "down"], r=2, rank_pattern={"experts.down": 3}, alpha_pattern={"up": 1}
    )
    sites = resolve(Holder(), config).sites
    assert [(site.rank, site.alpha) for site in sites] == [(2, 1), (3, 8)]


def test_quantised_parameters_are_refused():
    with pytest.raises(AttachError, match=r"whole.codes is quantised"):
        plan(Holder(), "default", LoraConfig(r=2, target_parameters=["codes"]))


def test_something_must_be_named():
    with pytest.raises(ConfigError, match="unless target_parameters names"):
        LoraConfig(target_modules=[])


def test_a_file_may_say_what_a_new_adapter_may_not():
    """PEFT's files keep a dropout that it never applied to attention, and may adapt a layer's weight as a parameter."""
    config = LoraConfig(target_modules=["attention"], lora_dropout=0.1, inference_mode=True)
    assert len(resolve(Holder(), config, strict=False).sites) == 2
    config = LoraConfig(r=2, target_parameters=["first.weight"], inference_mode=True)
    (site,) = resolve(Holder(), config, strict=False).sites
    assert (site.path, site.parameter, site.by_weight) == ("block.first", "weight", True)

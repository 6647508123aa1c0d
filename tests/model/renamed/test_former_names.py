"""What transformers tells of former names."""

import sys

import pytest
from torch import nn

import former_models
import tiny
import tiny_moe
from former_models import LLAVA, MIXTRAL, QWEN, QWEN_VL
from veneer.model.renamed.former_names import Place, former_layers, former_names, place_of


@pytest.mark.parametrize(
    ("former", "place"),
    [
        ("block_sparse_moe.experts.3.w1.weight", Place("mlp.experts.gate_up_proj", 3, 0, 2)),
        ("block_sparse_moe.experts.0.w3.weight", Place("mlp.experts.gate_up_proj", 0, 1, 2)),
        ("mlp.experts.2.w2.weight", Place("mlp.experts.down_proj", 2)),
        ("block_sparse_moe.gate.weight", Place("mlp.gate.weight")),
        ("self_attn.q_proj.weight", Place("self_attn.q_proj.weight")),
    ],
)
def test_places(former, place):
    names = former_names(tiny_moe.mixtral())
    found = place_of(names, f"model.layers.1.{former}")
    assert found == Place(f"model.layers.1.{place.name}", place.matrix, place.part, place.parts)


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (tiny_moe.mixtral, MIXTRAL),
        (tiny_moe.qwen2_moe, QWEN),
        (former_models.deepseek, QWEN),
        (former_models.llava, LLAVA),
        (former_models.qwen_vl, QWEN_VL),
    ],
)
def test_every_former_layer_is_known(make, family):
    model = make()
    now = former_models.weights_of(model)
    known = {path for paths in former_layers(former_names(model)).values() for path in paths}
    assert {path for path in family.before(model) if path not in now} <= known


def test_below_other_modules():
    whole = nn.ModuleDict({"a": tiny_moe.mixtral(), "b": nn.Sequential(tiny_moe.qwen3_moe(), nn.Linear(2, 2))})
    names = former_names(whole)
    assert [one.prefix for one in names] == ["a.", "b.0."]
    former = "b.0.model.layers.0.mlp.experts.1.up_proj.weight"
    assert place_of(names, former) == Place("b.0.model.layers.0.mlp.experts.gate_up_proj", 1, 1, 2)
    assert place_of(names, "b.1.weight") is None


def test_models_of_ones_own_have_none():
    assert former_names(tiny_moe.Block()) == []


def test_a_transformers_without_the_table(monkeypatch):
    model = tiny.llama()
    monkeypatch.delitem(sys.modules, "transformers.conversion_mapping")
    assert former_names(model) == []

"""What holds for every adapter: hypothesis chooses the layer, the settings and the numbers."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.model.tensors import adapter_tensors

MANY = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.integers(1, 6)
pytestmark = pytest.mark.filterwarnings("ignore:.*rank above what their weight can have")


@st.composite
def layers(draw: Any) -> tuple[nn.Module, Tensor]:
    """A layer of some kind and an input for it, in float64."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    out_features, in_features, rows = draw(sizes), draw(sizes), draw(sizes)
    kind = draw(st.sampled_from(["linear", "plain", "conv1d", "embedding"]))
    if kind == "embedding":
        return nn.Embedding(in_features, out_features), torch.randint(0, in_features, (rows, 3))
    layer = (
        Conv1D(out_features, in_features)
        if kind == "conv1d"
        else nn.Linear(in_features, out_features, kind == "linear")
    )
    return layer.double(), torch.randn(rows, 3, in_features, dtype=torch.float64)


@st.composite
def fields(draw: Any) -> dict[str, Any]:
    """Settings of an adapter."""
    return {
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.floats(0.01, 100)),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
    }


def adapted(layer: nn.Module, seed: int, **chosen: Any) -> veneer.PeftModel:
    config = veneer.LoraConfig(target_modules=["0"], init_lora_weights=False, **chosen)
    return veneer.get_peft_model(nn.Sequential(layer), config, generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 2**31)


@MANY
@given(layers(), fields(), seeds)
def test_the_merged_model_answers_as_the_adapted_one(made, chosen, seed):
    layer, x = made
    model = adapted(layer.double(), seed, **chosen)
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected, rtol=1e-9, atol=1e-9)


PARTS = (0.0, -0.0, 1e-40, 65504.0, -3e-5, 1.0)


@MANY
@given(layers(), fields(), seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_unmerging_gives_the_base_back_bit_for_bit(made, chosen, seed, dtype, data):
    layer, _ = made
    layer = layer.to(dtype)
    with torch.no_grad():
        flat = layer.weight.view(-1)
        for index, value in zip(range(len(flat)), itertools.cycle(data.draw(st.permutations(PARTS)))):
            flat[index] += value if abs(value) < 10 else 0
    before = layer.weight.detach().clone()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    model = adapted(layer, seed, **chosen)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer.weight.view(bits), before.view(bits))
    assert layer.weight is model.bare[0].weight
    model.merge_adapter()
    assert torch.equal(model.unload()[0].weight.view(bits), before.view(bits))


@MANY
@given(layers(), fields(), seeds)
def test_a_saved_adapter_loads_as_it_was(tmp_path_factory, made, chosen, seed):
    layer, x = made
    folder = tmp_path_factory.mktemp("adapter")
    base = {name: value.clone() for name, value in layer.state_dict().items()}
    model = adapted(layer, seed, **chosen)
    expected, tensors = model(x), adapter_tensors(model.bare, "default")
    model.save_pretrained(folder)
    plain = model.unload()
    assert all(torch.equal(plain[0].state_dict()[name], value) for name, value in base.items())
    again = veneer.PeftModel.from_pretrained(plain, folder)
    found = adapter_tensors(again.bare, "default")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert_close(again(x), expected, rtol=1e-12, atol=1e-12)
    assert again.peft_config["default"].to_dict() == {**model_config(chosen), **again_only(again)}


def model_config(chosen: dict[str, Any]) -> dict[str, Any]:
    return {**veneer.LoraConfig(target_modules=["0"], init_lora_weights=False, inference_mode=True, **chosen).to_dict()}


def again_only(again: veneer.PeftModel) -> dict[str, Any]:
    """What attaching finds out by itself."""
    return {"fan_in_fan_out": isinstance(again.bare[0], Conv1D)}

"""Every name of PEFT's LoRA layers that ours answer to, on layers of each kind, one after the other on both."""

import copy
import math
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.layers.attach import Adapted

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), torch.randn(3, 6)),
    "embedding": (lambda: nn.Embedding(10, 4), torch.arange(6).reshape(2, 3)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)),
    "conv1d": (lambda: Conv1D(4, 6), torch.randn(3, 6)),
}
CONFIG = {"target_modules": ["0"], "r": 4, "lora_alpha": 6, "lora_dropout": 0.0}


def pair(kind: str, **fields):
    """The same two adapters on the same layer, in PEFT and here."""
    torch.manual_seed(0)
    make, x = LAYERS[kind]
    base = nn.Sequential(make())
    theirs, mine = copy.deepcopy(base), base
    fields = {**CONFIG, "fan_in_fan_out": kind == "conv1d", **fields}
    for name in ("a", "b"):
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**fields), theirs, name)
        mine = veneer.inject_adapter_in_model(veneer.LoraConfig(**fields), mine, name)
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        state = {key: value + 0.1 * torch.randn_like(value) for key, value in state.items()}
        peft.set_peft_model_state_dict(theirs, state, name)
        veneer.set_peft_model_state_dict(mine, state, name)
    theirs[0].set_adapter("a")
    mine[0].set_adapter("a")
    assert isinstance(mine[0], Adapted)
    return theirs[0], mine[0], x


def tensors(value) -> list[torch.Tensor]:
    """What is in an entry of one of the mappings."""
    if isinstance(value, nn.Module):
        return [parameter for _, parameter in sorted(value.named_parameters())]
    return [value] if isinstance(value, torch.Tensor) else []


def check_alike(theirs, mine, x):
    assert_close(mine(x), theirs(x))
    for name in ("active_adapters", "merged", "merged_adapters", "disable_adapters"):
        assert getattr(mine, name) == getattr(theirs, name), name
    for name in ("r", "scaling", "use_dora", "lora_bias"):
        assert dict(getattr(mine, name)) == pytest.approx(dict(getattr(theirs, name))), name
    for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        ours, others = getattr(mine, name), getattr(theirs, name)
        assert sorted(ours) == sorted(others.keys()), name
        for adapter in ours:
            for one, other in zip(tensors(ours[adapter]), tensors(others[adapter]), strict=True):
                assert_close(one.flatten(), other.flatten())
                assert one.requires_grad == other.requires_grad, name
    assert sorted(mine.lora_dropout) == sorted(theirs.lora_dropout.keys())
    for adapter in mine.r:
        assert_close(mine.get_delta_weight(adapter), theirs.get_delta_weight(adapter))
    assert_close(mine.base_layer.weight, theirs.base_layer.weight)
    assert_close(mine.get_base_layer()(x), theirs.get_base_layer()(x))


STEPS = {
    "as it is": [],
    "another": [("set_adapter", "b")],
    "both": [("set_adapter", ["a", "b"])],
    "for use": [("set_adapter", ["b"], True)],
    "off": [("enable_adapters", False)],
    "off and on": [("enable_adapters", False), ("enable_adapters", True)],
    "frozen": [("set_requires_grad", ["a"], False)],
    "scaled": [("set_scale", "a", 0.5), ("scale_layer", 3.0)],
    "scaled and back": [("set_adapter", ["a", "b"]), ("scale_layer", 3.0), ("unscale_layer", 1.5)],
    "unscaled": [("set_scale", "a", 0.5), ("unscale_layer",)],
    "no such": [("set_scale", "c", 0.5)],
    "merged": [("merge",)],
    "merged by name": [("set_adapter", ["a", "b"]), ("merge", True, ["b", "a"])],
    "merged in turn": [("set_adapter", ["a", "b"]), ("merge", False, ["a"]), ("merge", False, ["b"])],
    "merged and back": [("scale_layer", 0.5), ("merge",), ("unmerge",)],
    "merged and off": [("merge",), ("enable_adapters", False)],
    "deleted": [("delete_adapter", "a")],
    "the other deleted": [("delete_adapter", "b")],
    "one of both deleted": [("set_adapter", ["b", "a"]), ("delete_adapter", "b")],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_the_same_calls(kind, steps, fields):
    if fields.get("use_dora") and sum(method == "merge" for method, *_ in steps) > 1:
        pytest.skip("what DoRA multiplies, of a weight that has another adapter in it, is defined by neither")
    if kind == "embedding" and any(method in ("scale_layer", "unscale_layer") for method, *_ in steps):
        pytest.skip("PEFT passes embeddings over when it scales layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, mine, x = pair(kind, **fields)
        for method, *arguments in steps:
            getattr(theirs, method)(*arguments)
            getattr(mine, method)(*arguments)
        if "off" in steps or steps == STEPS["merged and off"]:
            theirs(x)  # it unmerges when it is called
        check_alike(theirs, mine, x)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:.*have invalid shape")
def test_parts_are_written_through():
    theirs, mine, x = pair("linear", lora_bias=True)
    for layer in (theirs, mine):
        layer.scaling["a"] *= 0.25
        layer.lora_A["a"].weight.data.mul_(2)
        layer.lora_B["a"].weight = nn.Parameter(layer.lora_B["a"].weight.detach() + 1)
        layer.lora_B["a"].bias = nn.Parameter(torch.ones(4))
        layer.lora_A["a"].to("cpu")
    check_alike(theirs, mine, x)
    mine.lora_dropout["a"].p = 0.5
    assert mine.adapters["a"].dropout == 0.5
    assert_close(mine.lora_A["a"](x), theirs.lora_A["a"](x))
    assert math.isclose(mine.adapters["a"].scale, 6 / 4 / 4)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:.*have invalid shape")
def test_a_magnitude_is_put_back_where_it_was_taken():
    theirs, mine, x = pair("linear", use_dora=True)
    for layer in (theirs, mine):
        layer.lora_magnitude_vector["a"] = layer.lora_magnitude_vector["a"].to("cpu")
        layer.lora_magnitude_vector["a"].weight.data.mul_(2)
    check_alike(theirs, mine, x)

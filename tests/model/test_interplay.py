"""Features that meet: each pair was wrong once, or is easily so. Outputs in float64, where every error shows."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.errors import AdapterNameError, AttachError, MergeError

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
LAYERS = {"r": 4, "target_modules": ["first", "head"]}
QUANTISED = {**LAYERS, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}
X = tiny.ids(20)


def pair(first: dict, second: dict, base: nn.Module | None = None) -> veneer.PeftModel:
    """A model with two random adapters, `a` (active) and `b`."""
    base = tiny.Stack().double() if base is None else base
    generator = torch.Generator().manual_seed(1)
    model = tiny.shake(veneer.get_peft_model(base, veneer.LoraConfig(**first), "a", generator=generator), seed=2)
    model.add_adapter("b", veneer.LoraConfig(**second), generator=generator)
    model.set_adapter("b")
    tiny.shake(model, seed=3)
    model.set_adapter("a")
    return model


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def answers(model: veneer.PeftModel) -> dict[str, torch.Tensor]:
    found = {}
    for name in model.peft_config:
        model.set_adapter(name)
        found[name] = answer(model)
    return found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_base(model: nn.Module) -> None:
    for name, value in tiny.Stack().double().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


class TestTwoThatReplaceOneWeight:
    def test_each_switch_brings_its_own(self):
        model = pair(QUANTISED, {**QUANTISED, "loftq_config": {"loftq_bits": 4}})
        there = answers(model)
        assert not torch.equal(there["a"], there["b"])
        for name in "abbaab":
            model.set_adapter(name)
            assert torch.equal(answer(model), there[name])
            with model.disable_adapter():
                assert torch.equal(answer(model), answer(tiny.Stack().double()))
        assert_base(model.unload())

    def test_together_they_are_refused(self):
        model = pair(QUANTISED, QUANTISED)
        model.merge_adapter()
        before = state(model)
        with pytest.raises(AttachError, match="each replaced"):
            model.set_adapter(["a", "b"], inference_mode=True)
        assert model.get_model_status().merged_adapters == ["a"]
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        model.unmerge_adapter()
        with pytest.raises(AttachError, match="each replaced"):
            model.merge_adapter(["a", "b"])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (QUANTISED, LAYERS),
        (LAYERS, QUANTISED),
        (QUANTISED, QUANTISED),
        ({**LAYERS, "bias": "all"}, {**LAYERS, "lora_bias": True}),
    ],
    ids=["loftq-plain", "plain-loftq", "loftq-loftq", "bias-lora_bias"],
)
def test_merging_another_than_the_active_one(first, second):
    model = pair(first, second)
    there = answers(model)
    model.set_adapter("a")
    before = state(model)
    model.merge_adapter(["b"])
    assert_close(answer(model), there["b"], **TIGHT)
    with model.disable_adapter():
        assert torch.equal(answer(model), answer(tiny.Stack().double()))
    assert_close(answer(model), there["b"], **TIGHT)
    model.unmerge_adapter()
    assert torch.equal(answer(model), there["a"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_dora_multiplies_the_biases_of_adapters_before_it_merged_or_not(order):
    model = pair({**LAYERS, "use_dora": True}, {**LAYERS, "lora_bias": True})
    model.set_adapter(order)
    expected = answer(model)
    model.merge_adapter()
    assert_close(answer(model), expected, **TIGHT)
    assert_close(answer(model.merge_and_unload()), expected, **TIGHT)


class TestMergingForGood:
    def test_what_is_merged_already_is_what_stays(self):
        model = pair(LAYERS, LAYERS)
        model.merge_adapter(["b"])
        expected = answer(model)
        assert_close(answer(model.merge_and_unload()), expected, **TIGHT)

    def test_an_error_leaves_it_merged(self):
        model = pair(LAYERS, LAYERS)
        model.merge_adapter(["b"])
        before = state(model)
        with pytest.raises(AdapterNameError):
            model.merge_and_unload(adapter_names=["nobody"])
        with torch.no_grad():
            model.bare.first.adapters["a"].lora_B.fill_(torch.inf)
        with pytest.raises(MergeError, match="NaN or infinity"):
            model.merge_and_unload(adapter_names=["a"])
        assert model.get_model_status().merged_adapters == ["b"]
        before["base_model.model.first.adapters.a.lora_B"].fill_(torch.inf)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Convolved(nn.Module):
    """A convolution saves its weight itself for backward, where a linear layer saves a view of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.second = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).mT)


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_gradients_are_those_of_the_weights_that_forward_saw():
    config = veneer.LoraConfig(**{**QUANTISED, "target_modules": ["first", "second"]})
    model = tiny.shake(veneer.get_peft_model(Convolved(), config))
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    expected = grads(model)
    loss = model(x).square().sum()
    model.disable_adapter_layers()
    loss.backward()
    found = grads(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("reentrant", [False, True])
class TestCheckpointing:
    def model(self, reentrant: bool, **fields) -> veneer.PeftModel:
        config = veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **fields)
        model = tiny.shake(veneer.get_peft_model(tiny.llama(), config)).train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    def loss(self, model: nn.Module) -> torch.Tensor:
        return model(tiny.ids(), use_cache=False).logits.square().mean()

    def test_merging_before_backward_is_refused(self, reentrant):
        model = self.model(reentrant)
        loss = self.loss(model)
        model.merge_adapter()
        with pytest.raises(MergeError, match="Between forward and backward"):
            loss.backward()

    def test_so_is_taking_replaced_weights_away(self, reentrant):
        model = self.model(reentrant, init_lora_weights="loftq")
        loss = self.loss(model)
        model.disable_adapter_layers()
        with pytest.raises(MergeError, match="Between forward and backward"):
            loss.backward()

    def test_with_the_base_in_between_gradients_are_right(self, reentrant):
        model = self.model(reentrant, init_lora_weights="loftq")
        self.loss(model).backward()
        expected = grads(model)
        loss = self.loss(model)
        with model.disable_adapter(), torch.no_grad():
            self.loss(model.eval())
        loss.backward()
        found = grads(model)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value)


def test_peft_trains_no_more_modules_than_were_named(tmp_path):
    config = veneer.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])  # PEFT: input_layernorm too
    model = tiny.shake(veneer.get_peft_model(tiny.llama(), config))
    assert model.peft_config["default"].modules_to_save == ["model.norm"]
    model.save_pretrained(tmp_path)
    expected = model(tiny.ids()).logits
    assert_close(oracle.read_by_peft(tiny.llama(), tmp_path)(tiny.ids()).logits, expected, rtol=1e-4, atol=1e-5)
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(again(tiny.ids()).logits, expected)

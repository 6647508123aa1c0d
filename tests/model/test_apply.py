"""What attaching, switching and taking off cost, counted in Python calls; and what trains after a switch."""

import sys
from collections.abc import Callable

import pytest

import tiny
import veneer
from veneer import LoraConfig, PeftModel
from veneer.model.hotswap import hotswap_adapter_from_state_dict

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEW, MANY = 2, 8


def laden(adapters: int, *, layers: int = 6) -> PeftModel:
    model = veneer.get_peft_model(tiny.llama(layers=layers), LoraConfig(r=2, target_modules=TARGETS))
    for number in range(1, adapters):
        model.add_adapter(f"number{number}", LoraConfig(r=2, target_modules=TARGETS))
    return model


def calls(run: Callable[[], object]) -> int:
    """How many Python functions are called, generators that go on included."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def disabled(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


def swapped(model: PeftModel) -> None:
    values = veneer.get_peft_model_state_dict(model, adapter_name="default")
    hotswap_adapter_from_state_dict(model, values, "default", LoraConfig(r=2, target_modules=TARGETS))


OPERATIONS: dict[str, Callable[[PeftModel], object]] = {
    "attach": lambda model: model.add_adapter("more", LoraConfig(r=2, target_modules=TARGETS)),
    "switch": lambda model: model.set_adapter("number1"),
    "disable": disabled,
    "delete": lambda model: model.delete_adapter("number1"),
    "hotswap": swapped,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_cost_does_not_grow_with_the_adapters_there(name):
    # what remains for each is a look at two of its 42 layers: less than a call a layer
    run = OPERATIONS[name]
    run(laden(FEW))  # so that what is remembered is
    few, many = laden(FEW), laden(MANY)
    assert calls(lambda: run(many)) - calls(lambda: run(few)) <= 40 * (MANY - FEW)


def test_disabling_looks_at_no_layer():
    small, large = laden(2, layers=1), laden(2, layers=4)
    assert calls(lambda: disabled(small)) == calls(lambda: disabled(large))


def test_attaching_grows_with_the_layers_as_they_do():
    laden(1)
    small, large = tiny.llama(layers=4), tiny.llama(layers=8)
    config = LoraConfig(r=2, target_modules=TARGETS)
    of_small = calls(lambda: veneer.get_peft_model(small, config))
    assert calls(lambda: veneer.get_peft_model(large, config)) <= 2.1 * of_small


def trained(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("by_hand", ["number1", "number2", "adapters"])
def test_after_a_switch_only_the_chosen_train_also_if_others_were_let_train_by_hand(by_hand):
    model = laden(3, layers=2)
    for name, parameter in model.named_parameters():
        if by_hand in name:
            parameter.requires_grad_(True)
    model.set_adapter("number1")
    assert trained(model) == {name for name, _ in model.named_parameters() if ".number1." in name}


def test_after_a_switch_what_was_said_to_train_at_rest_does_not():
    model = laden(3, layers=2)
    model.set_requires_grad("number2", True)
    assert any(".number2." in name for name in trained(model))
    model.set_adapter("number1")
    assert trained(model) == {name for name, _ in model.named_parameters() if ".number1." in name}


def test_after_a_switch_what_a_layer_let_train_by_itself_does_not():
    model = laden(3, layers=2)
    model.bare.model.layers[1].mlp.up_proj.set_requires_grad("number2", True)
    model.set_adapter("number1")
    assert trained(model) == {name for name, _ in model.named_parameters() if ".number1." in name}


def test_a_new_adapter_of_a_deleted_ones_name_trains_only_once_it_acts():
    model = laden(2, layers=1)
    model.set_adapter("number1")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=2, target_modules=TARGETS))
    assert not any(".default." in name for name in trained(model))
    model.set_adapter("default")
    assert trained(model) == {name for name, _ in model.named_parameters() if ".default." in name}

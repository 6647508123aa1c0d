"""Walks past the adapters, and paths found again."""

import gc
import weakref

import pytest
from torch import nn

import tiny
import veneer
from veneer.layers.walk import finder, modules_outside


def laden(adapters: int) -> nn.Module:
    config = veneer.LoraConfig(target_modules=["q_proj", "v_proj"])
    model = veneer.get_peft_model(tiny.llama(), config)
    for number in range(1, adapters):
        model.add_adapter(f"number{number}", config)
    return model.bare


def test_a_walk_meets_what_the_bare_model_has_in_its_order():
    assert [path for path, _ in modules_outside(laden(2))] == [path for path, _ in tiny.llama().named_modules()]


def test_a_module_in_two_places_is_met_once_under_its_first_path():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared), shared, nn.ReLU())
    assert list(modules_outside(model)) == list(model.named_modules())


def test_a_place_without_a_module_is_passed_over():
    model = nn.Module()
    model.register_module("nothing", None)
    assert list(modules_outside(model)) == [("", model)]


def test_a_container_that_is_empty_is_met():
    model = nn.Sequential(nn.ModuleList())
    assert [path for path, _ in modules_outside(model)] == ["", "0"]


def test_every_path_is_found():
    model = laden(2)
    find = finder(model)
    assert all(find(path) is module for path, module in model.named_modules())


def test_a_path_that_is_not_there_is_refused_as_by_torch():
    with pytest.raises(AttributeError, match="no attribute `nowhere`"):
        finder(tiny.llama())("model.nowhere")


def test_what_found_modules_keeps_no_model_alive():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    find, gone = finder(model), weakref.ref(model)
    assert find("0.0") is model[0][0]
    gc.disable()
    try:
        del find, model
        assert gone() is None
    finally:
        gc.enable()

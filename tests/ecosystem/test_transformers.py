"""A transformers model's own adapter methods, pipelines and trainers under the alias: what they do with PEFT."""

from typing import Any

import pytest

from ecosystem.programs_run import differences, needs_peft, run

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
# PEFT cannot resume a model adapted in place, and swaps an adapter's numbers without its scale
OWN = {"warnings", "swapped", "in place: resumed", "in place: best"}


def shared(found: dict[str, Any]) -> dict[str, Any]:
    """What is the same through both doors."""
    return {key: value for key, value in found.items() if key not in OWN}


@pytest.fixture(scope="module")
def methods(tmp_path_factory) -> dict[str, Any]:
    return run("transformers_methods.py", tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> dict[str, Any]:
    return run("transformers_trainer.py", tmp_path_factory.mktemp("trainer"))


def test_adapters_are_added_switched_and_removed(methods):
    assert methods["class"] == ["LlamaForCausalLM", "LlamaForCausalLM", False]
    assert methods["two"][0] == ["two"]
    assert methods["one again"] == [["one"], methods["one"]]
    assert methods["on"] == methods["both"][1] != methods["off"]
    assert methods["left"] == ["one"]
    assert methods["files"] == ADAPTER


def test_adapters_are_loaded_however_it_is_asked_for(methods):
    assert methods["loaded"] == [methods["one"], 0]
    assert methods["loaded two"] == [["two"], methods["two"][1]]
    ways = ("from state", "subfolder", "beside the base", "mapped")
    assert all(methods[way] == methods["one"] for way in ways)
    assert methods["auto"][:2] == ["LlamaForCausalLM", methods["one"]]
    assert methods["judged"]
    assert methods["pipeline"] == methods["pipeline of a PeftModel"] != ""


def test_an_adapter_takes_the_place_of_another_with_its_scale(methods):
    assert methods["before swap"] == methods["one"]
    assert methods["swapped"] == methods["other"] != methods["one"]


def test_only_a_deletion_is_warned_of(methods):
    assert methods["warnings"] == ["VeneerWarning: Adapter 'two' was active; now 'one' is."]


@needs_peft
def test_the_methods_do_what_they_do_with_peft(methods, tmp_path):
    theirs = run("transformers_methods.py", tmp_path, door="peft")
    assert not differences(shared(methods), shared(theirs), within=1e-3)


@pytest.mark.parametrize("door", ["facade", "in place"])
def test_trainer_goes_on_from_adapters_alone(trainer, door):
    assert trainer[f"{door}: files"] == ADAPTER
    assert trainer[f"{door}: resumed"] == [trainer[door][0], True]
    scores, last, _ = trainer[f"{door}: best"]
    assert last == min(scores) != scores[-1]


def test_trainer_goes_on_with_several_adapters(trainer):
    assert trainer["two: files"] == sorted(ADAPTER * 2)
    assert trainer["two: resumed"] == [*trainer["two"], "default"]


def test_trainer_is_the_same_however_memory_is_saved(trainer):
    assert trainer["recomputed"] == trainer["reentrant"] == trainer["recomputed in place"] == trainer["facade"]
    assert trainer["smoothed"] == trainer["smoothed in place"] != trainer["facade"]


def test_trainer_warns_of_nothing_but_what_is_transformers_own(trainer):
    assert [warning for warning in trainer["warnings"] if not warning.startswith("FutureWarning")] == []


@needs_peft
def test_trainer_does_what_it_does_with_peft(trainer, tmp_path):
    theirs = run("transformers_trainer.py", tmp_path, door="peft")
    assert not differences(shared(trainer), shared(theirs))

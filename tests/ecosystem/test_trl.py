"""TRL's trainers under the alias: they train what they train with PEFT, number by number, and write adapters only."""

from typing import Any

import pytest

from ecosystem.programs_run import differences, needs_peft, run

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
OWN = {"warnings", "tied"}  # what may differ: PEFT fails where TRL reads the bias of a head with trained rows


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> dict[str, Any]:
    return run("trl_sft.py", tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def preference(tmp_path_factory) -> dict[str, Any]:
    return run("trl_preference.py", tmp_path_factory.mktemp("preference"))


def test_sft_goes_on_from_a_checkpoint_bit_by_bit(sft):
    assert sft["facade"] == ["PeftModelForCausalLM", True]
    assert sft["files"] == sft["saved"] == ADAPTER
    assert sft["resumed"] == [sft["plain"][0], True]
    assert sft["reloads"]


def test_sft_trains_what_a_loss_reads_past_the_head(sft):
    assert sft["tied"] is True
    assert sft["head"] != sft["plain"]
    assert "Applying a PEFT adapter to `lm_head` is not supported" in sft["head adapted"]


def test_sft_is_the_same_however_memory_is_saved(sft):
    assert sft["peft model"] == sft["reentrant"] == sft["plain"]
    assert not differences(sft["whole loss"], sft["plain"])


def test_sft_warns_of_nothing_but_what_is_transformers_own(sft):
    ours = [warning for warning in sft["warnings"] if not warning.startswith("FutureWarning")]
    assert [line.partition(":")[0] for line in ours] == ["VeneerWarning"]
    assert "token 0 is the padding" in ours[0]


@needs_peft
def test_sft_is_what_it_is_with_peft(sft, tmp_path):
    theirs = run("trl_sft.py", tmp_path, door="peft")
    assert not differences(*({key: one[key] for key in one if key not in OWN} for one in (sft, theirs)))


def test_dpo_keeps_the_reference_and_writes_adapters_only(preference):
    assert preference["dpo files"] == ADAPTER
    assert preference["ref files"] == sorted(ADAPTER * 2)
    assert preference["ref: adapters"] == ["default", "ref"]
    assert preference["ref stays"]
    assert (preference["acts"], preference["trains"]) == ("default", ["default"])


def test_dpo_switches_the_adapters_dropout_off_and_takes_the_base_for_the_reference(preference):
    assert preference["dpo drop"] == preference["dpo"]
    assert not differences(preference["dpo before"], preference["dpo"])
    assert not differences(preference["dpo explicit"], preference["dpo"])


def test_a_reward_model_trains_and_saves_its_head(preference):
    assert preference["reward files"] == ADAPTER
    assert preference["reward reloads"]


def test_preferences_warn_of_nothing_but_what_is_transformers_own(preference):
    assert [warning for warning in preference["warnings"] if not warning.startswith("FutureWarning")] == []


@needs_peft
def test_preferences_are_what_they_are_with_peft(preference, tmp_path):
    theirs = run("trl_preference.py", tmp_path, door="peft")
    assert not differences(*({key: one[key] for key in one if key not in OWN} for one in (preference, theirs)))

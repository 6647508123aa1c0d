"""A base that accelerate keeps partly on disk, under the alias: the numbers of the same base in memory, and PEFT's."""

from typing import Any

import pytest

from ecosystem.programs_run import differences, needs_peft, run


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    return run("offload.py", tmp_path_factory.mktemp("offload"))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_it_is_what_it_is_in_memory(found, kind):
    assert found["device"] == ["meta"]  # the layer's weights are not there
    assert not differences(found[f"{kind} offloaded"], found[kind], within=2e-4)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_it_trains_saves_loads_and_merges(found, kind):
    made = found[f"{kind} offloaded"]
    assert made["losses"] == sorted(made["losses"], reverse=True)
    assert made["base"] != made["trained"] != made["logits"]
    assert not differences([made["loaded"], made["merged"]], [made["trained"]] * 2, within=2e-4)


@needs_peft
def test_it_is_what_peft_makes_of_the_base_in_memory(found, tmp_path):
    """PEFT's adapters of layers on disk are on no device, so there is nothing to compare with."""
    theirs = run("offload.py", tmp_path, "in memory", door="peft")
    for kind in ("LoRA", "DoRA"):
        assert not differences(found[f"{kind} offloaded"], theirs[kind], within=1e-3)

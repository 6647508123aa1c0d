"""sentence-transformers under the alias: embedding models and cross-encoders with adapters, as with PEFT."""

from typing import Any

import pytest

from ecosystem.programs_run import differences, needs_peft, run

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    return run("sentences.py", tmp_path_factory.mktemp("sentences"))


def test_an_embedding_model_trains_saves_and_loads(found):
    assert found["trains"][1] == ["default"]
    assert found["checkpoint"] == found["saved"] == ADAPTER
    assert found["changed"]
    assert found["reloads"]
    assert found["loads"] == [["mine"], True]
    assert found["off"]
    assert found["left"] == [["default"], True]
    assert found["resumed"] == found["embedding"]


def test_a_cross_encoder_trains_saves_and_loads(found):
    assert found["judge saved"] == ADAPTER
    assert found["judge reloads"]


def test_nothing_is_warned_of(found):
    assert found["warnings"] == []


@needs_peft
def test_it_is_what_it_is_with_peft(found, tmp_path):
    theirs = run("sentences.py", tmp_path, door="peft")
    del theirs["warnings"]
    assert not differences({key: found[key] for key in theirs}, theirs)

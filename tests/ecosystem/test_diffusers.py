"""diffusers' pipelines, whose LoRA methods work the layers by PEFT's names, on Veneer, and beside PEFT where it is."""

import pytest

from ecosystem.programs_run import HAS_PEFT, run

PROGRAMS = ("diffusers_unet.py", "diffusers_transformer.py")


def check_alike(found, expected, where="what was found"):
    """Equal lists and names, and numbers within float error."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            check_alike(found[key], expected[key], f"{where}: {key}")
    elif isinstance(found, list) and found and isinstance(found[0], float):
        assert found == pytest.approx(expected, rel=1e-3, abs=2e-5), where
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            check_alike(one, other, f"{where}, {index}")
    else:
        assert found == expected, where


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_pipeline(program, tmp_path):
    (tmp_path / "alias").mkdir()
    found = run(program, tmp_path / "alias")
    if not HAS_PEFT:
        return
    (tmp_path / "peft").mkdir()
    check_alike(found, run(program, tmp_path / "peft", door="peft"))

"""transformers' Trainer as a whole program: imported last, and by two processes."""

import json

import pytest

from ecosystem.programs_run import PROGRAMS, python, run

DOORS = ["place", "facade"]


def check(found: dict, processes: int) -> None:
    assert not found.pop("early")
    files = found.pop("files")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert "model.safetensors" not in files
    assert found == {"processes": processes, "equal": True, "moved": True}


def test_a_trainer_imported_after_the_adapter_goes_on(tmp_path):
    check(run("trainer_goes_on.py", tmp_path, "facade", door="veneer"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_two_processes_go_on(door, tmp_path):
    done = python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        PROGRAMS / "trainer_goes_on.py",
        tmp_path,
        door,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    check(json.loads(done.stdout.strip().splitlines()[-1]), 2)

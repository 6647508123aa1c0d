"""`python -m veneer.as_peft`: a program runs as if Python had been called with it, and so do the ones it spawns."""

import json

import pytest

import veneer
from ecosystem.programs_run import PROGRAMS, attempt, python, run

SHORT = """
import sys
import peft
if "fail" in sys.argv:
    raise ValueError(f"from {peft.__veneer__}")
if "leave" in sys.argv:
    sys.exit(7)
print(__name__, sys.argv[1:])
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "short.py"
    path.write_text(SHORT)
    return path


def test_the_processes_that_a_program_spawns_have_the_alias():
    found = run("process.py", "a", "--b=c")
    assert found["spawned"] == ["__mp_main__", veneer.__version__, 3, "fixed_values"]
    assert found["workers"] == [veneer.__version__] * 2
    assert found["reloaded"] == [True, True, veneer.__version__]
    assert found["found again"] == ["peft", "peft.tuners.lora", True, True]
    assert found["arguments"] == ["a", "--b=c"]
    assert found["document"].startswith("What a program sees")
    assert found["file"]
    assert found["main"]
    assert found["pickled"] == [True, True]
    assert (found["version"], found["real"]) == ("0.21.2", 0)


def test_a_traceback_begins_in_the_program(program):
    done = attempt(program, "fail")
    assert done.returncode == 1
    said, trace = done.stderr.split("Traceback (most recent call last):\n")
    assert said.startswith("veneer ")
    assert trace.splitlines()[0] == f'  File "{program}", line 5, in <module>'
    assert trace.splitlines()[-1] == f"ValueError: from {veneer.__version__}"


def test_the_exit_code_is_the_program_s(program):
    assert attempt(program, "leave").returncode == 7
    assert not (program.parent / "__pycache__").exists()


def test_a_module_runs_too(program):
    done = python("-m", "veneer.as_peft", "-m", "short", "x", "-y", folder=program.parent)
    assert done.stdout.strip() == "__main__ ['x', '-y']"
    done = python("-m", "veneer.as_peft", "-m", "no.such.module")
    assert (done.returncode, "there is no module no.such.module" in done.stderr) == (2, True)


def test_torchrun_starts_it_and_one_process_says_so():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "veneer.as_peft")
    done = python(*launcher, PROGRAMS / "ranks.py", "x")
    assert done.returncode == 0, done.stderr[-3000:]
    found = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert found == [[0, 2.0, veneer.__version__, ["x"]], [1, 2.0, veneer.__version__, ["x"]]]
    assert done.stderr.count("`import peft` means Veneer") == 1

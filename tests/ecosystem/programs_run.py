"""Run whole programs, each in a process of its own, through one of three doors.

alias   written for PEFT, run on Veneer: `python -m veneer.as_peft program.py`
peft    the same program on the real PEFT, where it is installed
veneer  written for Veneer

A program prints what it found as JSON, in its last line.
"""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent
PROGRAMS = Path(__file__).parent / "programs"
SOURCE = TESTS.parent / "src"
HAS_PEFT = find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="compares with PEFT, which is not installed here")

_DOORS = {"alias": ["-m", "veneer.as_peft"], "peft": [], "veneer": []}


def run(program: str | Path, *arguments: object, door: str = "alias", folder: Path | None = None) -> Any:
    """What the program found. `program` is a file of programs/, or a path. Fails with its output if it fails.

    folder  where it runs
    """
    done = attempt(program, *arguments, door=door, folder=folder)
    assert done.returncode == 0, f"{program} through {door}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def attempt(
    program: str | Path, *arguments: object, door: str = "alias", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program and return what it said, whether it failed or not."""
    path = program if isinstance(program, Path) else PROGRAMS / program
    return python(*_DOORS[door], path, *arguments, folder=folder)


def python(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python, offline, with one thread, and Veneer and the tiny models of the tests on its path."""
    settings = {
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **settings},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def differences(found: Any, expected: Any, *, within: float = 2e-4, where: str = "") -> list[str]:
    """Where two findings differ, numbers by more than `within` of their size."""
    if isinstance(found, dict) and isinstance(expected, dict):
        pairs = [(f"{where}[{key!r}]", found.get(key), expected.get(key)) for key in sorted({*found, *expected})]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(f"{where}[{at}]", *pair) for at, pair in enumerate(zip(found, expected, strict=True))]
    elif isinstance(found, float) and isinstance(expected, float):
        return (
            [] if math.isclose(found, expected, rel_tol=within, abs_tol=within) else [f"{where}: {found}, {expected}"]
        )
    else:
        return [] if found == expected else [f"{where}: {found}, {expected}"]
    return [line for place, one, other in pairs for line in differences(one, other, within=within, where=place)]

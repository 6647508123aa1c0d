"""The fast path under FSDP2: sharded as blocks, as parts of them, or each layer by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "sharded_step.py"


@pytest.mark.slow
@pytest.mark.parametrize("words", ["block", "attention", "layer", "layer kept", "block dora", "layer kept dora"])
def test_a_sharded_step_is_that_of_one_process(words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*command, str(PROGRAM), *words.split()], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("traffic.py")


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "ranks"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)])
def test_a_step_sends_the_bytes_of_the_arithmetic(profile, ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    done = subprocess.run([*command, str(PROGRAM), profile], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"]

"""The peak memory of one step, in a process of its own: what a process once held, the next contender would inherit.

`peak_of("benchmarks.activation_memory:step_of", contender="PEFT", …)` starts Python, calls `step_of(contender="PEFT",
…)` there, which prepares everything and returns the step; runs the step once to warm up and once to measure.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent.parent
# glibc raises the size from which it gives memory back with what was freed: held fixed, the peak repeats to a percent.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Peak:
    """Bytes: what the process held before the step (model, adapters, inputs), and the most it held during it."""

    before: int
    most: int

    @property
    def step(self) -> int:
        """What the step needed on top."""
        return self.most - self.before


def peak_of(maker: str, *, device: str = "cpu", **arguments: Any) -> Peak:
    """The peak of the step that `maker` ("module:function") returns for these arguments, which must be JSON.

    Bytes resident for the CPU, where Linux tells; bytes allocated for CUDA.
    Raises CalledProcessError if the process fails; its error is printed.
    """
    command = [sys.executable, "-m", "benchmarks.peak", maker, device, json.dumps(arguments)]
    done = subprocess.run(command, cwd=HOME, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _measured(step: Callable[[], object], device: str) -> Peak:
    step()
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return Peak(before, torch.cuda.max_memory_allocated(device))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _resident("VmRSS")
    step()
    return Peak(before, _resident("VmHWM"))


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _main() -> None:
    maker, device, arguments = sys.argv[1:]
    module, _, function = maker.partition(":")
    step = getattr(importlib.import_module(module), function)(device=device, **json.loads(arguments))
    peak = _measured(step, device)
    print(json.dumps({"before": peak.before, "most": peak.most}))


if __name__ == "__main__":
    _main()

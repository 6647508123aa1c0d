"""Contenders in turn in one process; the ratio is the median of the rounds' ratios, so what disturbs a round cancels.

A script is one function from options to a `Figure`, and a main:

    def figure(options: Options) -> Figure:
        table = measure(
            "Two SmolLM2-shaped layers",
            {
                "limit": limit_step,                                  # called once a round, timed
                "PEFT": peft_step,
                "Veneer": Contender(load, prepare=fresh_model),       # load(fresh_model()), only load is timed
            },
            options,
            reference="limit",
            aims={"Veneer": Aim(at_most=1.10), …},                    # or Aim(at_most=0.3, against="PEFT")
            setting={"dtype": "fp32", "rank": 16},
        )
        return Figure("step", "Training step", "What is compared …", [table])

    if __name__ == "__main__":
        main(figure, __doc__)

`python -m benchmarks.<figure>` prints the tables and writes results/<figure>.json; `--quick` runs a round or two, to
see that it works, and writes only where `--results FOLDER` says. Name the script in `FIGURES` of `__main__.py`.

What is not a time (bytes, tokens per second) makes its own `Table` of `Row`s: one value a round, in `unit`. For
memory, `benchmarks.peak.peak_of` runs one contender in a process of its own. A row that was computed ("what the
arithmetic says") stands beside the measured ones with the same number of values.
"""

import argparse
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column
from rich.table import Table as RichTable

import veneer
from benchmarks.record import RESULTS, Aim, Figure, Row, Table

__all__ = ["Aim", "Contender", "Figure", "Options", "Row", "Table", "main", "measure", "show"]

VERSIONS = ("torch", "peft", "transformers", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Options:
    """What the command line said.

    rounds  instead of the script's own number, if given
    """

    quick: bool = False
    device: str = "cpu"
    rounds: int | None = None


@dataclass(frozen=True)
class Contender:
    """What is timed, and what comes before it in each round and is not: `run(prepare())`, or `run()` without."""

    run: Callable[..., object]
    prepare: Callable[[], object] | None = None


def measure(
    title: str,
    contenders: Mapping[str, Contender | Callable[[], object]],
    options: Options,
    *,
    reference: str | None = None,
    rounds: int = 15,
    warmup: int = 2,
    calls: int = 1,
    aims: Mapping[str, Aim] | None = None,
    setting: dict[str, Any] | None = None,
    note: str = "",
    plot: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Table:
    """Time each contender once a round, in an order that moves on by one each round. Seconds per call.

    calls  how often a contender is called in one timing; for what takes less than a millisecond
    aims   by contender; each must be one
    """
    assert set(aims or {}) <= set(contenders), "an aim for no contender"
    assert reference is None or reference in contenders, "the reference is no contender"
    rounds, warmup = (2, 1) if options.quick else (options.rounds or rounds, warmup)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there already is looked through in no round
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = _seconds(contenders[name], options.device, calls, clock)
            if turn >= warmup:
                times[name].append(seconds)
    gc.unfreeze()
    rows = [Row(name, times[name], (aims or {}).get(name)) for name in names]
    return Table(title, rows, reference, "s", {**(setting or {}), "rounds": rounds}, note, plot)


def _seconds(contender: Contender | Callable[[], object], device: str, calls: int, clock: Callable[[], float]) -> float:
    if not isinstance(contender, Contender):
        contender = Contender(contender)
    assert calls == 1 or contender.prepare is None, "what is prepared is used up by one call"
    given = () if contender.prepare is None else (contender.prepare(),)
    gc.collect()  # so that nobody pays for another's garbage
    synchronize(device)
    start = clock()
    for _ in range(calls):
        contender.run(*given)
    synchronize(device)
    return (clock() - start) / calls


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on; nothing that tells whose machine it is."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device,
        "python": platform.python_version(),
        "veneer": veneer.__version__,
    }
    if device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for package in VERSIONS:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(figure: Figure, console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console()
    for table in figure.tables:
        head, lines = table.cells()
        shown = RichTable(head[0], *(Column(name, justify="right") for name in head[1:]))
        shown.title, shown.title_justify = table.title, "left"
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
        console.print(", ".join(f"{key} {value}" for key, value in table.setting.items()), style="dim")
        if table.note:
            console.print(table.note)


def main(
    figure: Callable[[Options], Figure], about: str | None, arguments: list[str] | None = None, **shared: Any
) -> Figure:
    """Read the command line, measure, print, and write the JSON. `shared` is for tests."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it works, not to measure")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--rounds", type=int, help="instead of the script's own number")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU; by default as many as torch takes")
    parser.add_argument("--results", type=Path, help="folder for the JSON: benchmarks/results, or none if quick")
    said = parser.parse_args(arguments)
    if said.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    if said.threads:
        torch.set_num_threads(said.threads)
    made = figure(Options(said.quick, said.device, said.rounds, **shared))
    made = replace(made, machine=machine(said.device), quick=said.quick)
    show(made)
    folder = said.results or (None if said.quick else RESULTS)
    if folder:
        made.save(folder)
    return made

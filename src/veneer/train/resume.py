"""Going on with a run that was stopped: from its newest whole checkpoint, with the same settings and data.

OUTPUT/run.yaml and OUTPUT/data.json say what the checkpoints were made with. A run that goes on with anything else
would be neither the old run nor a new one, so every difference is refused but those that only say how long to train,
what to log and to keep, and in what portions to compute a step, for want of memory.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from veneer.errors import RunError, bullet_list
from veneer.storage.write import write_file
from veneer.train.run_file import load
from veneer.train.settings import RunConfig

FORMERLY = ("training.group_by_length=false",)  # what a run did before it could be set
SETTINGS_FILE, DATA_FILE, LOG_FILE, CHECKPOINTS = "run.yaml", "data.json", "log.jsonl", "checkpoints"
CHECKPOINT_FILES = ("adapter_model.safetensors", "scheduler.pt", "trainer_state.json")
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "latest")  # of Trainer, of FSDP, of DeepSpeed: one of them
PROCESSES_FILE, ATTEMPT_FILE = "processes.json", "launch.json"
MAY_DIFFER = {  # the data is compared by what it holds, not by where it lies; the output is where we look
    "output",
    "overwrite",
    "data.train",
    "data.eval",
    *(
        f"training.{name}"
        for name in (
            "epochs",
            "max_steps",
            "log_every",
            "eval_every",
            "save_every",
            "keep_checkpoints",
            "resume",
            "gradient_checkpointing",
        )
    ),
}
# what each step learns from is their product: the same rows, in smaller portions or larger ones
PORTIONS = ("training.batch_size", "training.gradient_accumulation")

Fingerprint = dict[str, dict[str, Any]]


class Stopped(KeyboardInterrupt):
    """Training was interrupted; the text says what was kept."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, oldest first."""
    return [path for path in _numbered(folder) if _is_complete(path)]


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint with the highest step that was written to its end; RunError if there is none."""
    complete = complete_checkpoints(folder)
    if complete:
        return complete[-1]
    count = len(_numbered(folder))
    found = f"{count} checkpoint{'s' * (count > 1)}, none complete" if count else "no checkpoint"
    raise RunError(f"training.resume=true found {found} in {folder}. Set training.save_every, or start without resume.")


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written.

    >>> step_of(Path("out/checkpoints/checkpoint-40"))
    40
    """
    return int(checkpoint.name.rpartition("-")[2])


def _numbered(folder: Path) -> list[Path]:
    named = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(named, key=step_of)


def _is_complete(checkpoint: Path) -> bool:
    count = processes_of(checkpoint)
    states = ["rng_state.pth"] if count == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]
    if not all((checkpoint / name).is_file() for name in (*CHECKPOINT_FILES, *states)):
        return False
    if not any((checkpoint / name).is_file() for name in OPTIMIZER_FILES):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint."""
    try:
        return int(json.loads((checkpoint / PROCESSES_FILE).read_text(encoding="utf-8"))["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def write_processes(checkpoint: Path, count: int) -> None:
    """Note in a checkpoint how many processes write it."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_file(checkpoint / PROCESSES_FILE, json.dumps({"processes": count}).encode())


def fingerprint(settings: RunConfig, rows: Mapping[str, int]) -> Fingerprint:
    """What the data files hold: rows, bytes and SHA-256, by setting. `rows` are the numbers of rows that were read."""
    files = {"data.train": settings.data.train, "data.eval": settings.data.eval}
    return {name: _of_file(Path(path), rows[name]) for name, path in files.items() if path is not None}


def _of_file(path: Path, rows: int) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": str(path), "rows": rows, "sha256": digest}


def write_record(output: Path, settings: RunConfig, data: Fingerprint) -> None:
    """Write OUTPUT/run.yaml, defaults written out, and OUTPUT/data.json."""
    import yaml

    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_file(output / SETTINGS_FILE, text.encode())
    write_file(output / DATA_FILE, (json.dumps(data, indent=2) + "\n").encode())


def refuse_changes(
    output: Path, settings: RunConfig, data: Fingerprint, *, processes_before: int = 1, processes: int = 1
) -> None:
    """Raise RunError that lists each setting and data file in which the run to go on with differs from this one.

    The number of processes may be another where each step takes as many rows as before.
    """
    for name in (SETTINGS_FILE, DATA_FILE):
        if not (output / name).is_file():
            raise RunError(
                f"training.resume=true needs {output / name}, which says what the checkpoints were made with. "
                "Start anew with overwrite=true instead."
            )
    before, now = _flat(_as_recorded(output / SETTINGS_FILE)), _flat(settings)
    rows_before, rows_now = _rows_a_step(before) * processes_before, _rows_a_step(now) * processes
    may_differ = MAY_DIFFER | ({*PORTIONS} if rows_before == rows_now else set())
    differences = [
        f"{key} was {_shown(before[key])}, is now {_shown(now[key])}"
        for key in now
        if key not in may_differ and before[key] != now[key]
    ]
    if rows_before != rows_now and processes_before != processes:
        differences.append(
            f"a step took {rows_before} rows in {processes_before} processes, would take {rows_now} in {processes}: "
            "training.batch_size × training.gradient_accumulation × processes must stay the same"
        )
    differences += _data_differences(_read_fingerprint(output / DATA_FILE), data)
    if differences:
        raise RunError(
            bullet_list(
                f"The run in {output} cannot go on with other settings or data.",
                [*differences, "Set them back, or start anew with overwrite=true or another output."],
            )
        )


def _as_recorded(file: Path) -> RunConfig:
    """The settings that OUTPUT/run.yaml says; what was no setting yet when it was written has the value it had then."""
    text = file.read_text(encoding="utf-8-sig")
    return load(file, [line for line in FORMERLY if line.partition("=")[0].rpartition(".")[2] not in text])


def _read_fingerprint(file: Path) -> Fingerprint:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: {"rows": int(part["rows"]), "sha256": str(part["sha256"])} for name, part in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RunError(f"{file} is damaged. Start anew with overwrite=true instead.") from None


def _rows_a_step(flat: Mapping[str, Any]) -> int:
    return math.prod(flat[name] for name in PORTIONS)


def _data_differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    found = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now or name not in before:
            found.append(f"{name} was {'set' if name in before else 'null'}, is now {'set' if name in now else 'null'}")
        elif before[name]["rows"] != now[name]["rows"]:
            found.append(f"{name} held {before[name]['rows']} rows, holds {now[name]['rows']} now")
        elif before[name]["sha256"] != now[name]["sha256"]:
            found.append(f"{name} holds other rows than before")
    return found


def _flat(settings: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.model_dump().items():
        if name in ("data", "lora", "training"):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _shown(value: Any) -> str:
    """A value as run.yaml would say it.

    >>> _shown(0.0002), _shown(True), _shown(None)
    ('0.0002', 'true', 'null')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def trim_log(file: Path, step: int) -> None:
    """Leave the lines up to a step, and no torn one: the steps after it are about to be done again."""
    if not file.is_file():
        return
    kept = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) <= step]
    write_file(file, "".join(f"{line}\n" for line in kept).encode())


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def note_attempt(output: Path) -> None:
    """Note in the output which of torchrun's runs writes it."""
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):
        write_file(output / ATTEMPT_FILE, json.dumps({"run_id": run_id}).encode())


@dataclass(frozen=True, slots=True)
class Start:
    """How a run starts: from a checkpoint, over what is in the output, or (neither) in an empty folder."""

    resume: bool
    overwrite: bool

    def applied_to(self, settings: RunConfig) -> RunConfig:
        """The settings of a run that starts so."""
        training = settings.training.model_copy(update={"resume": self.resume})
        return settings.model_copy(update={"training": training, "overwrite": self.overwrite})


def started_again(settings: RunConfig) -> Start:
    """How a run starts, also where torchrun starts its processes again (`--max-restarts`) after one has failed.

    If the attempt before wrote to the output, this one goes on from its newest checkpoint, or begins anew if there is
    none. An output of any other run is as untouchable as ever.
    """
    output = Path(settings.output).expanduser()
    run_id, asked = os.environ.get("TORCHELASTIC_RUN_ID"), Start(settings.training.resume, settings.overwrite)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or run_id is None:
        return asked
    try:
        ours = json.loads((output / ATTEMPT_FILE).read_text(encoding="utf-8"))["run_id"] == run_id
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        return asked
    there = bool(complete_checkpoints(output / CHECKPOINTS))
    return Start(resume=there, overwrite=not there)


def what_is_kept(settings: RunConfig) -> str:
    """What an interrupted run leaves behind, and the command that goes on with it."""
    output = Path(settings.output).expanduser()
    kept = complete_checkpoints(output / CHECKPOINTS)
    if not kept:
        return "Nothing was saved; training.save_every=… keeps checkpoints to go on from."
    command = f"veneer train {quote(str(output / SETTINGS_FILE))} training.resume=true"
    again = " overwrite=false" if settings.overwrite else ""
    return f"Kept: {kept[-1].name}. Go on with: {command}{again}"

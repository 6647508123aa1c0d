"""Checkpoints of a run on many devices: adapters and optimizer, written by all ranks at once, read by any number.

torch.distributed.checkpoint does it, in its safetensors format: each rank writes its shards to a file of its own, and
reads what it needs of all files. Nothing is pickled. The base is not part of it.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import AdapterFileError, ConfigError, MissingPackageError, bullet_list, shortened
from veneer.layers.attach import Adapters
from veneer.layers.saved_module import Copies
from veneer.layers.sharded import is_sharded, reshard
from veneer.layers.token_rows import RowsByAdapter
from veneer.model.overlay import adapted_part, overlay_needed
from veneer.model.ranks import all_ranks, is_first
from veneer.storage.write import write_file

NOTES = "veneer_checkpoint.json"
_ADAPTERS, _OPTIMIZER = "adapters/", "optimizer/"
_PLAIN = (int, float, str, bool, type(None))


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write what a run needs to go on: adapters, optimizer, and what you say of its progress. All ranks must call it.

        save_checkpoint(f"run/step-{step:06}", model, optimizer, progress={"step": step})

    folder    a new one for each checkpoint, on a disk that all ranks see; it is there when all of it is
    progress  values that JSON has: the step, a seed, where in the data it is, a scheduler's state

    Raises AdapterFileError if the folder has files already or cannot be written, ConfigError for an optimizer whose
    state cannot be kept, or RankError.
    """
    folder = Path(folder)
    stage = folder.with_name(f".{folder.name}.unfinished")
    with all_ranks(f"preparing the checkpoint {folder}"):
        part = adapted_part(model)
        values = _values(part)
        notes: dict[str, Any] = {"configs": _configs(part), "progress": dict(progress or {}), "optimizer": None}
        if optimizer is not None:
            notes["optimizer"], states = _optimizer_apart(part, optimizer)
            values |= states
        _as_json(notes)  # before anything is written
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise AdapterFileError(f"{folder} is there already: each checkpoint needs a folder of its own.")
        storage = _storage()
    with all_ranks(f"preparing the checkpoint {folder}"):
        if is_first():
            shutil.rmtree(stage, ignore_errors=True)  # of a run that ended in the middle
            stage.mkdir(parents=True)
    with _errors_of_torch(f"The checkpoint {folder} was not written"):
        writer = storage.HuggingFaceStorageWriter(str(stage), save_distributed=True)
        storage.save(values, storage_writer=writer, no_dist=_alone())
    with all_ranks(f"finishing the checkpoint {folder}"):
        if is_first():
            notes["files"] = {file.name: _size(file) for file in sorted(stage.glob("*.safetensors"))}
            write_file(stage / NOTES, _as_json(notes).encode())
            stage.rename(folder)


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Give a model's adapters, and its optimizer, what a checkpoint holds; returns its `progress`.

    The model must have the adapters that were saved, and may be spread over any number of ranks, or over none. All
    ranks must call it.

    Raises AdapterFileError that lists what differs, or RankError; and then nothing has changed.
    """
    folder = Path(folder)
    with all_ranks(f"reading the checkpoint {folder}"):
        part = adapted_part(model)
        notes = _notes(folder)
        saved = _metadata(folder, notes)
        values = _values(part)
        problems = _differing(notes["configs"], _configs(part))
        state: dict[str, Any] = {}
        if optimizer is not None:
            if notes["optimizer"] is None:
                raise AdapterFileError(f"{folder} holds no state of an optimizer: leave it out of the call.")
            problems += _other_groups(notes["optimizer"], part, optimizer)
            state = {} if problems else _optimizer_together(optimizer, notes["optimizer"], saved)
            values |= _tensors_of(state, part, optimizer)
        problems += [
            f"{name}: {list(saved[name].size) if name in saved else 'nothing'} there, {list(value.shape)} here"
            for name, value in values.items()
            if name not in saved or saved[name].size != value.shape
        ]
        problems += [f"{name}: not here" for name in saved if name.startswith(_ADAPTERS) and name not in values]
        if problems:
            headline = f"The checkpoint {folder} is not one of this model and optimizer:"
            raise AdapterFileError(bullet_list(headline, shortened(problems)))
        storage = _storage()
    with _errors_of_torch(f"The checkpoint {folder} cannot be read"):
        storage.load(values, storage_reader=storage.HuggingFaceStorageReader(str(folder)), no_dist=_alone())
    if optimizer is not None:
        optimizer.load_state_dict(state)
    return notes["progress"]


def _values(part: nn.Module) -> dict[str, Tensor]:
    """What adapters have of their own and what else trains, by its name in the model: the tensors themselves."""
    reshard(part)
    ours = tuple(
        f"{path}." for path, module in part.named_modules() if isinstance(module, Adapters | Copies | RowsByAdapter)
    )
    saved = part.state_dict(keep_vars=True).keys()
    kept = {name: p for name, p in part.named_parameters() if p.requires_grad or name.startswith(ours)}
    kept |= {name: b for name, b in part.named_buffers() if name in saved and name.startswith(ours)}
    return {_ADAPTERS + name: value.detach() for name, value in kept.items()}


def _configs(part: nn.Module) -> dict[str, Any]:
    return {name: json.loads(config.to_json()) for name, config in overlay_needed(part).configs.items()}


def _differing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    names = [f"adapter {name!r}: not in both" for name in saved.keys() ^ own.keys()]
    return names + [
        f"{field} of adapter {name!r}: {saved[name].get(field)!r} there, {own[name].get(field)!r} here"
        for name in saved.keys() & own.keys()
        for field in own[name]
        if saved[name].get(field) != own[name][field] and field != "inference_mode"
    ]


def _names(part: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The name in the model of each parameter of each group of the optimizer."""
    names = {id(parameter): name for name, parameter in part.named_parameters()}
    if any(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "The optimizer has parameters that the model does not have. Make it after veneer.shard(model), which "
            "replaces them."
        )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _optimizer_apart(part: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the notes say of the optimizer, and its tensors by name. Raises ConfigError."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    problems = []
    names = _names(part, optimizer)
    for group, own_names in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], own_names, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    numbers.setdefault(name, {})[key] = value
                    continue
                tensors[f"{_OPTIMIZER}{name}/{key}"] = value.detach()
                apart = is_sharded(parameter) and value.dim() and value.shape != parameter.shape
                if apart or is_sharded(parameter) != is_sharded(value) and value.dim():
                    problems.append(f"{key} of {name}: {type(value).__name__} of shape {list(value.shape)}")
    if problems:
        headline = (
            f"{type(optimizer).__name__} keeps its state for shards in a form of its own, which other numbers of ranks "
            "could not read. Use torch's AdamW, or LoraFAOptimizer:"
        )
        raise ConfigError(bullet_list(headline, shortened(problems)))
    settings = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "names": names, "settings": settings, "numbers": numbers}, tensors


def _other_groups(notes: Mapping[str, Any], part: nn.Module, optimizer: Optimizer) -> list[str]:
    names = _names(part, optimizer)
    if notes["class"] != type(optimizer).__name__:
        return [f"the optimizer: {notes['class']} there, {type(optimizer).__name__} here"]
    if notes["names"] != names:
        there, here = sum(map(len, notes["names"])), sum(map(len, names))
        return [f"the optimizer's groups: {there} parameters in {len(notes['names'])} groups there, {here} in "
                f"{len(names)} here, or others"]  # fmt: skip
    return []


def _optimizer_together(optimizer: Optimizer, notes: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for the optimizer with room for the tensors of the checkpoint."""
    keys: dict[str, list[str]] = {}
    for key in saved:
        if key.startswith(_OPTIMIZER):
            keys.setdefault(key.removeprefix(_OPTIMIZER).rpartition("/")[0], []).append(key)
    state: dict[int, dict[str, Any]] = {}
    groups = []
    number = 0
    for group, names, settings in zip(optimizer.param_groups, notes["names"], notes["settings"], strict=True):
        settings = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in settings.items()}
        groups.append({**settings, "params": list(range(number, number + len(names)))})
        for parameter, name in zip(group["params"], names, strict=True):
            room = {key.rpartition("/")[2]: _room(saved[key], parameter) for key in keys.get(name, ())}
            if found := {**notes["numbers"].get(name, {}), **room}:
                state[number] = found
            number += 1
    return {"state": state, "param_groups": groups}


def _room(saved: Any, parameter: Tensor) -> Tensor:
    """An empty tensor for a value of the optimizer's, spread as its parameter is if it has the parameter's shape."""
    dtype = saved.properties.dtype
    if saved.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(saved.size, dtype=dtype)


def _tensors_of(state: Mapping[str, Any], part: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors in that state dict by their names in the checkpoint."""
    flat = [name for names in _names(part, optimizer) for name in names]
    return {
        f"{_OPTIMIZER}{flat[number]}/{key}": value
        for number, found in state.get("state", {}).items()
        for key, value in found.items()
        if isinstance(value, Tensor)
    }


def _as_json(notes: Mapping[str, Any]) -> str:
    try:
        return json.dumps(notes, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "A checkpoint keeps tensors, and besides them what JSON has: numbers, texts, lists and dictionaries "
            f"({error}). Look at `progress` and the settings of the optimizer."
        ) from None


def _notes(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{folder} is no checkpoint of save_checkpoint: {error}") from None


def _metadata(folder: Path, notes: Mapping[str, Any]) -> dict[str, Any]:
    """What each tensor of a checkpoint is like (`size` and `properties.dtype`), by name. Raises AdapterFileError."""
    if lost := [f for f, size in notes["files"].items() if not (folder / f).is_file() or _size(folder / f) != size]:
        raise AdapterFileError(f"{folder} lacks {', '.join(shortened(lost))}, or what is there was cut off.")
    with _errors_of_torch(f"The checkpoint {folder} cannot be read"):
        return dict(_storage().HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def _size(file: Path) -> int:
    return file.stat().st_size


def _storage() -> Any:
    """torch.distributed.checkpoint. Raises MissingPackageError if it is too old to write safetensors."""
    import torch.distributed.checkpoint as storage

    if not hasattr(storage, "HuggingFaceStorageReader"):
        raise MissingPackageError(
            f"torch {torch.__version__} cannot write checkpoints of many ranks as safetensors: use torch 2.9 or later."
        )
    return storage


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


@contextmanager
def _errors_of_torch(what: str) -> Iterator[None]:
    """What torch raises on all ranks, as an AdapterFileError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
            yield
    except CheckpointException as error:
        reasons = [f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items()]
        raise AdapterFileError(bullet_list(f"{what}:", shortened(reasons))) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterFileError(f"{what}: {error}") from error

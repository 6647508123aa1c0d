"""The weights of a base model on disk, read one tensor at a time: one safetensors file, or shards with an index."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import AdapterFileError
from veneer.storage.header import TensorInfo, read_header
from veneer.storage.values import read_rows

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: by the name of each tensor, its file and what the file's header says of it.

    begins  where in its file each tensor begins, in bytes
    """

    location: Path
    files: dict[str, Path]
    tensors: dict[str, TensorInfo]
    begins: dict[str, int]

    def read(self, name: str) -> "Tensor":
        """One tensor, on the CPU. Raises AdapterFileError if its file cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.files[name]), framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{self.files[name]} cannot be read: {error}") from None

    def read_rows(self, name: str, rows: slice) -> "Tensor":
        """Some rows of a tensor, on the CPU; only these are read. Raises AdapterFileError."""
        return read_rows(self.files[name], self.tensors[name], self.begins[name], rows)


def open_checkpoint(location: str | Path) -> Checkpoint:
    """The checkpoint at a safetensors file, an index of shards, or in a folder that holds one of these.

    Reads headers only. Raises AdapterFileError if there is none, or if it is damaged or incomplete.
    """
    path = _found(Path(location))
    files = _shards(path) if path.name.endswith(".json") else [path]
    by_name: dict[str, Path] = {}
    tensors: dict[str, TensorInfo] = {}
    begins: dict[str, int] = {}
    for file in files:
        header = read_header(file)
        by_name |= dict.fromkeys(header.tensors, file)
        tensors |= header.tensors
        begins |= {name: header.data_start + info.start for name, info in header.tensors.items()}
    return Checkpoint(path, by_name, tensors, begins)


def cached_checkpoint(repository: str, *, revision: str | None = None) -> Path | None:
    """The folder of the hub's cache that holds a model's repository, without asking the hub; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (SINGLE, INDEX):
        try:
            found = try_to_load_from_cache(repository, name, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _found(path: Path) -> Path:
    if path.is_file():
        return path
    if path.name == SINGLE and path.with_name(INDEX).is_file():  # as PEFT's callers name a sharded checkpoint
        return path.with_name(INDEX)
    for name in (SINGLE, INDEX):
        if (path / name).is_file():
            return path / name
    raise AdapterFileError(
        f"There is no {SINGLE} and no {INDEX} at {path}. The original weights are read one by one, which needs "
        "safetensors: a pickle (pytorch_model.bin) has to be converted first."
    )


def _shards(index: Path) -> list[Path]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in table.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{index} cannot be read as an index of shards: {error}") from None
    if strange := [name for name in names if Path(name).name != name]:
        raise AdapterFileError(f"{index} names a shard outside its own folder: {strange[0]!r}.")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise AdapterFileError(f"{index} names {', '.join(missing[:3])}, and the folder does not hold it.")
    return [index.parent / name for name in names]

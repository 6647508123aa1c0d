"""What was measured on data for an initialisation, in a safetensors file, so that it need not be measured again.

The names of the tensors are those of PEFT's files, which are pickles: such a file is refused, and easily converted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import AdapterFileError, bullet_list
from veneer.storage.header import read_header
from veneer.storage.values import write_values
from veneer.storage.write import fill_file

if TYPE_CHECKING:
    from torch import Tensor

_PICKLES = (b"PK\x03\x04", b"\x80\x02")


def is_written(file: str | Path | None) -> bool:
    """Whether there is such a file, with something in it."""
    return file is not None and Path(file).is_file() and Path(file).stat().st_size > 0


def write_measured(file: str | Path, tensors: Mapping[str, "Tensor"], *, notes: Mapping[str, str]) -> None:
    """Write the tensors in one step; folders are made. Raises AdapterFileError if the file cannot be written."""
    path = Path(file)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill_file(path, lambda stage: write_values(stage, plain, notes))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be written: {error.strerror or error}") from None


def read_measured(
    file: str | Path, shapes: Mapping[str, tuple[int, ...]], *, notes: Mapping[str, str]
) -> dict[str, "Tensor"]:
    """The tensors of these names, once names, shapes and notes are found to fit; the file may hold more tensors.

    A note that the file does not have is not compared: a converted file has none.
    Raises AdapterFileError listing what does not fit.
    """
    path = Path(file)
    _refuse_pickle(path)
    header = read_header(path)
    problems = [
        f"{key}: it was written with {header.metadata[key]!r}, {value!r} is wanted"
        for key, value in notes.items()
        if header.metadata.get(key, value) != value
    ]
    for name, shape in shapes.items():
        info = header.tensors.get(name)
        if info is None:
            problems.append(f"missing      {name} {list(shape)}")
        elif info.shape != shape:
            problems.append(f"wrong shape  {name} {list(info.shape)}, {list(shape)} is wanted")
    if problems:
        shown = problems if len(problems) <= 6 else [*problems[:6], f"… and {len(problems) - 6} more like these"]
        raise AdapterFileError(
            bullet_list(f"{path} does not fit this model and config. Delete it, or name another file:", shown)
        )
    return _values(path, list(shapes))


def _values(path: Path, names: list[str]) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from None


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(_PICKLES):
        raise AdapterFileError(
            f"{path} is a pickle (PEFT writes such files), which can run code when it is read. If you trust it, "
            "convert it: safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in "
            f"torch.load({path.name!r}, weights_only=True).items()}}, new), and name the new file."
        )

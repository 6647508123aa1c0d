"""What a command may write over, and what it was given in place of a model."""

import os
import tempfile
from pathlib import Path

from veneer.errors import RunError
from veneer.storage.adapter_file import CONFIG_FILE as ADAPTER_FILE


def is_empty(folder: Path) -> bool:
    """Whether nothing would be lost by writing there: no such folder, or nothing in it."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def refuse_run_folder(name: str) -> None:
    """Raise RunError for the folder of a run, which holds the adapter one folder below."""
    if Path(name, "adapter", ADAPTER_FILE).is_file() and not Path(name, ADAPTER_FILE).is_file():
        raise RunError(f"{name} is the folder of a run: did you mean {Path(name, 'adapter')}?")


def refuse_adapter(name: str) -> None:
    """Raise RunError for an adapter where a model is needed."""
    if Path(name, ADAPTER_FILE).is_file():
        raise RunError(f"{name} holds an adapter, not a model. Name the model it belongs to.")


def refuse_unwritable(folder: Path) -> None:
    """Raise RunError if a folder cannot be made, or written to if it is there. Leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"{folder} cannot be written to: {error.strerror or error}.") from None
    finally:
        for path in reversed(made):
            path.rmdir()


def refuse_non_empty(folder: Path, *, hint: str) -> None:
    """Raise RunError if something is at `folder` already; `hint` says what to do instead."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, not a folder.")
    if not is_empty(folder):
        raise RunError(f"{folder} is not empty. {hint}")

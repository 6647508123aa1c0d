"""What a command may write over."""

from pathlib import Path

from veneer.errors import RunError


def is_empty(folder: Path) -> bool:
    """Whether nothing would be lost by writing there: no such folder, or nothing in it."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def refuse_non_empty(folder: Path, *, hint: str) -> None:
    """Raise RunError if something is at `folder` already; `hint` says what to do instead."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, not a folder.")
    if not is_empty(folder):
        raise RunError(f"{folder} is not empty. {hint}")

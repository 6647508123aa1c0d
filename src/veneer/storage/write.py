"""Write files so that a crash leaves the old ones or the new ones, never a mixture.

A folder is staged beside the old one, flushed to disk, checked, and swapped in by one rename.
"""

import ctypes
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_STAGE = ".veneer-stage-"
_ASIDE = "-old"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: the file is old or new, whatever happens. Follows no symbolic link."""
    fill_file(path, lambda stage: _write_new(stage, content))


def fill_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Put at `path`, in one step, what `fill(stage)` writes to a new file beside it. Follows no symbolic link."""
    _sweep(path, path.parent)
    stage = path.parent / _stage_name(path)
    try:
        fill(stage)
        _sync(stage)
        stage.replace(path)
    finally:
        stage.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _write_new(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(content)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make or replace files of `folder` in one step. `fill(stage)` writes the new files into an empty stage.

    Files of the folder that `fill` does not write stay, also those that other processes write at the time. If `fill`
    raises, nothing has changed. A folder that cannot be renamed (the current one, a mount point, or one whose parent is
    read-only) gets its new files one by one, each in one step.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = not folder.exists() or _can_be_swapped(folder)
    place = folder.parent if whole else folder
    _sweep(folder, place)
    with _staged(folder, place) as stage:
        fill(stage)
        _give_usual_modes(stage)
        new = list(stage.rglob("*"))
        if not whole:
            _sync_all(new)
            for file in sorted(stage.iterdir()):
                file.replace(folder / file.name)
            _sync_folder(folder)
            return
        if folder.exists():
            _link_the_rest(folder, stage)
            shutil.copymode(folder, stage)
        _sync_all([*new, stage])
        before = _swap(stage, folder)
        if before is not None:
            _link_the_rest(before, folder)  # what other processes put there meanwhile
            if before != stage:
                shutil.rmtree(before, ignore_errors=True)
        _sync_folder(folder.parent)


def _stage_name(target: Path) -> str:
    return f"{_STAGE}{target.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def _staged(folder: Path, place: Path) -> Iterator[Path]:
    stage = place / _stage_name(folder)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sweep(target: Path, place: Path) -> None:
    """Remove the stages that a process which died left; if it had put the old folder aside, put that back."""
    ours = re.compile(rf"{re.escape(_STAGE + target.name)}-(?P<pid>\d+)-[0-9a-f]{{8}}(?P<old>{_ASIDE})?")
    for stage in place.iterdir():
        found = ours.fullmatch(stage.name)
        if found is None or _is_alive(int(found["pid"])):
            continue
        if found["old"] and not target.exists():
            stage.rename(target)
        elif stage.is_dir():
            shutil.rmtree(stage, ignore_errors=True)
        else:
            stage.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _can_be_swapped(folder: Path) -> bool:
    try:
        here = Path.cwd()
    except FileNotFoundError:  # this process's folder was deleted
        here = Path("/")
    inside = folder == here or folder in here.parents
    return not inside and not folder.is_mount() and os.access(folder.parent, os.W_OK)


def _link_the_rest(folder: Path, stage: Path) -> None:
    """Carry over what the folder holds besides the new files, without copying where links are possible."""
    for entry in folder.iterdir():
        new = stage / entry.name
        if new.exists() or new.is_symlink():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(entry), str(new))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(stage: Path, folder: Path) -> Path | None:
    """Put the stage in the folder's place, and say where the old folder is now; None if there was none."""
    if not folder.exists():
        try:
            stage.rename(folder)
            return None
        except OSError:
            if not folder.exists():  # else another process has made it
                raise
    if _exchange(stage, folder):
        return stage
    aside = stage.with_name(stage.name + _ASIDE)
    try:
        folder.rename(aside)
        stage.rename(folder)
    except BaseException:
        if not folder.exists():
            aside.rename(folder)
        raise
    return aside


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _give_usual_modes(stage: Path) -> None:
    """Give each file the mode that `open` gives; safetensors makes files that only their owner can read."""
    probe = stage / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in stage.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def start_flush(descriptor: int, start: int, length: int) -> None:
    """Let the disk begin with these bytes of a file that will be flushed, where the system can; waits for nothing."""
    if (begin := _sync_file_range()) is not None:
        begin(descriptor, start, length, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        begin = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    begin.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return begin


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(paths: Sequence[Path]) -> None:
    """Flush files and folders at once: each waits for the disk, which takes them together."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda path: (_sync_folder if path.is_dir() else _sync)(path), paths))


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems refuse to flush a folder; the rename itself is still one step
        _sync(folder)

"""Writing an adapter folder that fails, or dies, at its n-th step. Run as a script, it reports on deaths.

A step is a call of one of the functions below, through which every change of a folder goes.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.storage import write

STEPS = ("mkdir", "open", "fsync", "rename", "replace", "link", "chmod", "unlink", "rmdir", "listdir", "close")
OLD = {"adapter_config.json": "old config", "adapter_model.safetensors": "old weights", "notes.txt": "mine"}
NEW = {"adapter_config.json": "new config", "adapter_model.safetensors": "new weights", "notes.txt": "mine"}
MODES = ("exchange", "aside", "in place")


def fill_new(stage: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (stage / name).write_text(NEW[name])


def make_old(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, text in OLD.items():
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str] | None:
    if not folder.is_dir():
        return None
    return {entry.name: entry.read_text() if entry.is_file() else "a folder" for entry in folder.iterdir()}


@contextmanager
def mode(name: str) -> Iterator[None]:
    """The way the files come into place: by one exchange, by two renames, or file by file."""
    exchange, can_be_swapped = write._exchange, write._can_be_swapped
    if name == "aside":
        write._exchange = lambda one, other: False
    elif name == "exchange":
        write._exchange = lambda one, other: step_of_exchange(exchange, one, other)
    else:
        write._can_be_swapped = lambda folder: False
    try:
        yield
    finally:
        write._exchange, write._can_be_swapped = exchange, can_be_swapped


def step_of_exchange(exchange: Callable[[Path, Path], bool], one: Path, other: Path) -> bool:
    os.close(os.open(other, os.O_RDONLY))  # a step before it, which may fail
    return exchange(one, other)


@contextmanager
def at_step(n: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Call `act` instead of the n-th step; gives the steps taken."""
    taken: list[str] = []
    real = {name: getattr(os, name) for name in STEPS}

    def stand_in(name: str):
        def step(*args, **kwargs):
            taken.append(name)
            if len(taken) == n:
                act()
            return real[name](*args, **kwargs)

        return step

    for name in STEPS:
        setattr(os, name, stand_in(name))
    try:
        yield taken
    finally:
        for name in STEPS:
            setattr(os, name, real[name])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(stage: Path) -> None:
    raise RuntimeError("this save is not meant to succeed")


def deaths(place: Path, name: str) -> Iterator[dict]:
    """For each n: what the folder holds after a death at step n, after a save that fails, and after one that works."""
    for n in range(1, 200):
        folder = place / f"{name.replace(' ', '-')}-{n}" / "adapter"
        make_old(folder)
        child = os.fork()
        if child == 0:
            with mode(name), at_step(n, die):
                write.write_folder(folder, fill_new)
            os._exit(0)
        died = os.waitpid(child, 0)[1] != 0
        after = content(folder)
        with mode(name):
            try:
                write.write_folder(folder, refuse)
            except RuntimeError:
                failed = content(folder)
            write.write_folder(folder, fill_new)
        left = [file.name for file in folder.parent.iterdir()]
        yield {"n": n, "died": died, "after": after, "failed": failed, "again": content(folder), "left": left}
        if not died:
            return


if __name__ == "__main__":
    print(json.dumps({name: list(deaths(Path(sys.argv[1]), name)) for name in MODES}))

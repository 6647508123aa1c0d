"""Run a program that was written for PEFT on Veneer: `python -m veneer.as_peft program.py …`, or `… -m module …`.

The program is `__main__`, as if Python had been called with it. A process that it spawns (multiprocessing, the workers
of a DataLoader) imports what `__main__` was started as: this module, which puts the alias in place there, too, before
it runs the program under the name `__mp_main__`.
"""

import os
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from veneer.errors import VeneerError
from veneer.integrations.as_peft import install_as_peft

USAGE = "usage: python -m veneer.as_peft program.py [arguments]\n       python -m veneer.as_peft -m module [arguments]"
_PROGRAM = "VENEER_AS_PEFT_PROGRAM"  # what spawned processes are told: path of the program, and its package
_CHILD = "__mp_main__"  # multiprocessing's name for the parent's `__main__`


class _Program(SourceFileLoader):
    """Loads a program, which leaves no compiled file behind."""

    def set_data(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is written."""


def main(arguments: list[str]) -> None:
    """Put the alias in place and run the program as if Python had been called with the rest of the line."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not arguments or arguments == ["-m"]:
        _stop(f"{USAGE}\nwhich program?")
    program, by_module = Path(arguments[0]), arguments[0] == "-m"
    if not by_module and not program.is_file():
        _stop(f"veneer: {_why_not(program)}")
    try:
        install_as_peft(quiet=os.environ.get("LOCAL_RANK", "0") != "0")  # of processes by torchrun, one says so
    except VeneerError as error:
        _stop(f"veneer: {error}")
    if by_module:
        path, package = _module(arguments[1])
        sys.argv = [str(path), *arguments[2:]]
    else:
        path, package = program, ""
        sys.argv = arguments
        if not sys.flags.safe_path:
            sys.path[0] = str(path.resolve().parent)
    os.environ[_PROGRAM] = os.pathsep.join([str(path.resolve()), package])
    _run("__main__", path, package)


def _stop(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(2)


def _why_not(program: Path) -> str:
    """Why this is no program to run."""
    if str(program).startswith("-"):
        return f"{program} is no program, and there are no options: the program comes first, then its arguments."
    if program.is_dir():
        return f"{program} is a folder. A package runs by `python -m veneer.as_peft -m {program.name}`."
    return f"there is no program {program}."


def _module(name: str) -> tuple[Path, str]:
    """The file that `python -m name` runs, and the package it belongs to."""
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.__main__".startswith(error.name):
            raise
        spec = None
    if spec is None or spec.origin is None:
        _stop(f"veneer: there is no module {name} that can be run.")
    return Path(spec.origin), spec.parent or ""


def _run(name: str, path: Path, package: str) -> ModuleType:
    """Run the program as the module of this name, and return that."""
    found = spec_from_loader(name, _Program(name, str(path)))
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    module.__package__ = package
    module.__spec__ = __spec__  # by which spawned processes find this module
    sys.modules[name] = module
    sys.excepthook = _from(str(path))
    found.loader.exec_module(module)
    return module


def _from(path: str) -> Any:
    """An excepthook whose tracebacks begin in the program; before that there is only how it was started."""
    hook = sys.excepthook

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        start = trace
        while start is not None and start.tb_frame.f_code.co_filename != path:
            start = start.tb_next
        hook(kind, error if start is None else error.with_traceback(start), start or trace)

    return say


if __name__ == "__main__":
    main(sys.argv[1:])
elif __name__ == _CHILD and _PROGRAM in os.environ:
    install_as_peft(quiet=True)
    _path, _, _package = os.environ[_PROGRAM].rpartition(os.pathsep)
    globals().update(vars(_run(_CHILD, Path(_path), _package)))

"""Change a module of another library once it is imported, without importing it."""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from veneer.errors import VeneerWarning

_Change = Callable[[ModuleType], None]
_OURS = "_veneer_stands_before"  # on a function of ours: the one it stands before
_WAITING: dict[str, list[_Change]] = {}
_ASKED: set[tuple[str, str, str]] = set()


def when_imported(name: str, change: _Change) -> None:
    """Call `change(module)` now if the module is there, or else right after its first import.

    It is done once, however often it is asked for: functions of one qualified name are one change. A module that is
    in the middle of its import is changed when somebody asks again.
    """
    asked = (name, change.__module__, change.__qualname__)
    if asked not in _ASKED:
        _ASKED.add(asked)
        _WAITING.setdefault(name, []).append(change)
    module = sys.modules.get(name)
    if module is not None:
        if not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _carry_out(module, name)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def stand_before(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(theirs)` in the place of a function of a module or class; nothing if that is ours already.

    Warns if there is no such function: the library is of a version that Veneer was not tried with.
    """
    theirs = getattr(owner, name, None)
    if theirs is None:
        warnings.warn(
            f"{owner.__name__} has no {name}: this version of the library is one that Veneer was not tried with, and "
            "its trainers may not know adapters of Veneer.",
            VeneerWarning,
            stacklevel=2,
        )
    elif not hasattr(theirs, _OURS):
        ours = wraps(theirs)(make(theirs))
        setattr(ours, _OURS, theirs)
        setattr(owner, name, ours)


def _carry_out(module: ModuleType, name: str) -> None:
    for change in _WAITING.pop(name, ()):
        change(module)


class _Watch(MetaPathFinder):
    """Finds nothing itself: lets the other finders find a module that is waited for, and watches it being run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in _WAITING:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader)
        return spec


class _Watched(Loader):
    """A module's own loader, which has the changes carried out when it has run."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # inspect and linecache ask the loader for the source
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _carry_out(module, module.__name__)

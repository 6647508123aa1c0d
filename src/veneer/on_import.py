"""Run a function on a module of another library once it is imported, without importing it."""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_Change = Callable[[ModuleType], None]
_OURS = "_veneer_stands_before"  # on a function of ours: the one it stands before
_WAITING: dict[str, list[_Change]] = {}


def when_imported(name: str, change: _Change) -> None:
    """Call `change(module)` now if the module is there, or else right after its first import."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        change(module)
        return
    _WAITING.setdefault(name, []).append(change)
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def stand_before(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(theirs)` in the place of a function of a module or class; nothing if that is ours already."""
    theirs = getattr(owner, name)
    if not hasattr(theirs, _OURS):
        ours = wraps(theirs)(make(theirs))
        setattr(ours, _OURS, theirs)
        setattr(owner, name, ours)


class _Watch(MetaPathFinder):
    """Finds nothing itself: lets the other finders find a module that is waited for, and watches it being run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in _WAITING:
            return None
        changes = _WAITING.pop(fullname)  # so that the search below passes by here
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader, changes)
        return spec


class _Watched(Loader):
    """A module's own loader, and what to do when it has run."""

    def __init__(self, loader: Loader, changes: list[_Change]) -> None:
        self.loader = loader
        self.changes = changes

    def __getattr__(self, name: str) -> Any:  # inspect and linecache ask the loader for the source
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for change in self.changes:
            change(module)

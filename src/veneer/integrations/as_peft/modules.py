"""The modules called `peft` and `peft.…`: each looks its names up on first use."""

from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from veneer._version import __version__
from veneer.integrations.as_peft import absent, names

_PUBLIC = "veneer"


class Alias(ModuleType):
    """A module of the alias. It answers the names of its table, and says what to do where there is none."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"{name}, answered by Veneer {__version__}.")
        self.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        self.__path__ = []
        self.__file__ = absent.__file__  # `from peft import X` says no more than this where X is not there
        self.__veneer__ = __version__
        for fact, value in names.FACTS.items():
            setattr(self, fact, value)

    @property
    def __all__(self) -> list[str]:
        return [name for name in names.MODULES[self.__name__] if not name.startswith("_")]

    def __getattr__(self, name: str) -> Any:
        mine = names.MODULES[self.__name__]
        if name not in mine:
            raise AttributeError(absent.why_absent(self.__name__, name, list(mine)), name=name, obj=self)
        value = getattr(import_module(names.HOMES.get(name, _PUBLIC)), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *names.MODULES[self.__name__]})


def made() -> dict[str, Alias]:
    """Every module of the alias by its dotted name, each an attribute of the one above it."""
    modules = {name: Alias(name) for name in names.MODULES}
    for name, module in modules.items():
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, module)
    return modules

"""Where `import` finds the modules of the alias, and `importlib.metadata` the version that libraries ask for."""

from collections.abc import Iterable, Mapping
from email.message import Message
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer._version import __version__

VERSION = "0.21.2"  # of PEFT: the one whose names and behaviour the alias has
NAME = "peft"


class VeneerAsPeft(Distribution):
    """A distribution with a name and a version, and no files."""

    def read_text(self, filename: str) -> str | None:
        """The text of the metadata; None for any other file."""
        if filename not in ("METADATA", "PKG-INFO"):
            return None
        text = Message()
        text["Metadata-Version"] = "2.1"
        text["Name"] = NAME
        text["Version"] = VERSION
        text["Summary"] = f"The names of PEFT, answered by Veneer {__version__}"
        return text.as_string()

    def locate_file(self, path: Any) -> Path:
        """Where a file of the distribution would lie: nowhere."""
        raise FileNotFoundError(f"{NAME} is Veneer under another name and has no files: {path}")


class Finder(DistributionFinder):
    """Finds the distribution `peft`, and the modules of the alias where a program reloads or forgets them."""

    def __init__(self, modules: Mapping[str, ModuleType]) -> None:
        self.modules = modules

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """How to get a module of the alias; None for any other."""
        module = self.modules.get(fullname)
        return None if module is None else ModuleSpec(fullname, _There(module), origin=module.__file__, is_package=True)

    def find_distributions(self, context: DistributionFinder.Context = DistributionFinder.Context()) -> Iterable[Any]:  # noqa: B008
        """The one distribution, if it is asked for, or all are."""
        return [VeneerAsPeft()] if context.name is None or context.name.lower() == NAME else []


class _There(Loader):
    """Hands out a module that is there; loading it anew changes nothing."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass

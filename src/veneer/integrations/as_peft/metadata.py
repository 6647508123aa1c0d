"""The distribution `peft`, for libraries that ask `importlib.metadata` which version is installed."""

from collections.abc import Iterable
from email.message import Message
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
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
    """Finds the distribution `peft` and nothing else. The modules are in `sys.modules` and need no finder."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """None: no module comes from here."""
        return None

    def find_distributions(self, context: DistributionFinder.Context = DistributionFinder.Context()) -> Iterable[Any]:  # noqa: B008
        """The one distribution, if it is asked for, or all are."""
        return [VeneerAsPeft()] if context.name is None or context.name.lower() == NAME else []

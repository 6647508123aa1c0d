"""Put the alias in place, before anything has looked for PEFT."""

import sys
from types import ModuleType
from typing import Any

from veneer._version import __version__
from veneer.errors import AliasError
from veneer.integrations.adapted_model import AdaptedModel
from veneer.integrations.as_peft.metadata import NAME, VERSION, Finder
from veneer.integrations.as_peft.modules import Alias, made
from veneer.on_import import when_imported

# They ask once, when they are imported, whether PEFT is there, and keep its classes.
ASK_ON_IMPORT = ("transformers.trainer_utils", "transformers.trainer", "trl", "diffusers")


def install_as_peft(*, quiet: bool = False) -> None:
    """Let `import peft` mean Veneer in this process, for programs and libraries written for PEFT.

    quiet  do not say on standard error that this was done

    `peft.__veneer__` tells that it is in place. Calling it again does nothing. What Veneer does not have raises an
    AttributeError that says so (an ImportError in `from peft import …`).

    Raises AliasError if the real PEFT was imported already, or a library that has looked for it and found none.
    """
    there = sys.modules.get(NAME)
    if isinstance(there, Alias):
        return
    if there is not None:
        raise AliasError(
            f"The real PEFT {getattr(there, '__version__', '')} is imported already. Call veneer.install_as_peft() "
            "before anything imports peft, or start the program by `python -m veneer.as_peft program.py`."
        )
    if early := [name for name in ASK_ON_IMPORT if name in sys.modules]:
        raise AliasError(
            f"{', '.join(early)} looked for PEFT already. Call veneer.install_as_peft() before importing it, or start "
            "the program by `python -m veneer.as_peft program.py`."
        )
    modules = made()
    sys.modules.update(modules)
    sys.meta_path.insert(0, Finder(modules))
    _forget_that_there_is_none()
    when_imported("transformers.integrations.peft", _let_models_adapt)
    if not quiet:
        print(f"veneer {__version__}: `import peft` means Veneer in this process (as PEFT {VERSION}).", file=sys.stderr)


def _let_models_adapt(module: ModuleType) -> None:
    """Give transformers' models Veneer's way to get their first adapter; from there on `AdaptedModel` does the rest."""
    mixin: Any = module.PeftAdapterMixin  # type: ignore[attr-defined]
    mixin.add_adapter = AdaptedModel.add_adapter  # type: ignore[attr-defined]
    mixin.load_adapter = AdaptedModel.load_adapter  # type: ignore[attr-defined]


def _forget_that_there_is_none() -> None:
    """transformers keeps the answer to "is PEFT there?"."""
    asked = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal", "_is_package_available"):
        forget = getattr(getattr(asked, name, None), "cache_clear", None)
        if forget is not None:
            forget()

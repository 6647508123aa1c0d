"""Every exception Veneer raises for a user.

    VeneerError
    ├── ConfigError (ValueError)           a LoraConfig that cannot be right
    │   └── UnknownFieldError (TypeError)  a field that does not exist
    ├── TargetError (ValueError)           names that match nothing, or layers that cannot be adapted
    ├── AdapterNameError (ValueError)      an adapter name that is unknown, taken or not allowed
    ├── AdapterFileError (ValueError)      an adapter folder that is missing, damaged or does not fit
    ├── AttachError (RuntimeError, ValueError)  a model in a state in which adapters cannot be attached
    ├── MergeError (RuntimeError, ValueError)   a merge that would be wrong
    ├── RankError (RuntimeError)           another process of a run on many devices failed, or is somewhere else
    ├── AliasError (RuntimeError)          the name `peft` cannot mean Veneer any more in this process
    ├── ArgumentError (TypeError)          an argument of a kind that cannot be meant: a text for a number, say
    ├── DataError (ValueError)             a training row that cannot be used
    ├── RunError (ValueError)              a run file or a command line that cannot be right
    └── MissingPackageError (ImportError)  an optional package that is not installed

    VeneerWarning (UserWarning)            something allowed that is probably not meant

Each subclasses the built-in that its callers would expect, so code written for PEFT keeps its `except` clauses.
"""

import reprlib
from collections.abc import Sequence


class VeneerError(Exception):
    """Base of all errors of this package."""


class ConfigError(VeneerError, ValueError):
    """A configuration that cannot be right."""


class UnknownFieldError(ConfigError, TypeError):
    """A configuration field that does not exist."""


class TargetError(VeneerError, ValueError):
    """Names that match nothing in the model, or layers that cannot be adapted."""


class AdapterNameError(VeneerError, ValueError):
    """An adapter name that is unknown, already taken or not allowed."""


class AdapterFileError(VeneerError, ValueError):
    """An adapter folder that is missing, damaged or does not fit the model."""


class AttachError(VeneerError, RuntimeError, ValueError):
    """A model in a state in which adapters cannot be attached."""


class MergeError(VeneerError, RuntimeError, ValueError):
    """A merge that would give wrong weights."""


class RankError(VeneerError, RuntimeError):
    """Another process of a run on many devices failed, did not come, or is somewhere else."""


class AliasError(VeneerError, RuntimeError):
    """The name `peft` cannot mean Veneer any more in this process."""


class ArgumentError(VeneerError, TypeError):
    """An argument of a kind that cannot be meant."""


class DataError(VeneerError, ValueError):
    """A training row that cannot be used."""


class RunError(VeneerError, ValueError):
    """A run file or a command line that cannot be right."""


class MissingPackageError(VeneerError, ImportError):
    """An optional package that is not installed."""


class VeneerWarning(UserWarning):
    """Something allowed that is probably not meant."""


def check_kind(value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raise ArgumentError unless `value` is of a kind; `what` says what is needed."""
    if not isinstance(value, kind):
        raise ArgumentError(f"{what} is needed, not {reprlib.repr(value)} ({type(value).__name__}).")


def bullet_list(headline: str, problems: Sequence[str]) -> str:
    """A message that names every problem found: a headline and one indented line each."""
    return "\n".join([headline, *(f"  {problem}" for problem in problems)])


def shortened(lines: Sequence[str], limit: int = 6) -> list[str]:
    """The first lines, and how many more there are."""
    return list(lines) if len(lines) <= limit else [*lines[:limit], f"… and {len(lines) - limit} more like these"]

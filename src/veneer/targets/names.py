"""What a name in a config means: a full path or its last parts; a string alone is a regular expression."""

from collections.abc import Callable, Iterable

from veneer.config import matches


def named(names: Iterable[str], path: str) -> list[str]:
    """Those of the names that mean this path: the path itself, or its end after a dot."""
    return [name for name in names if path == name or path.endswith(f".{name}")]


def as_list(choice: list[str] | str | None) -> list[str]:
    """The entries of a field that may be one name, several or none."""
    return [choice] if isinstance(choice, str) else choice or []


def selector(choice: list[str] | str) -> Callable[[str], bool]:
    """The test whether a path is meant by a list of names, or by a regular expression."""
    if isinstance(choice, str):
        return lambda path: matches(choice, path)
    return lambda path: bool(named(choice, path))


def inside(path: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of the roots or lies below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)

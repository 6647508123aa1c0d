"""What a name in a config means: a full path or its last parts; a string alone is a regular expression."""

from collections.abc import Callable, Iterable

from veneer.config import ends_of, matches


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
    names = frozenset(choice)
    return lambda path: not names.isdisjoint(ends_of(path))


def by_end(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths by each of their ends at dots: what `named` says of many names and many paths.

    >>> by_end(["0.q_proj", "1.q_proj"])["q_proj"]
    ['0.q_proj', '1.q_proj']
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        for end in ends_of(path):
            found.setdefault(end, []).append(path)
    return found


def inside(path: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of the roots or lies below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)

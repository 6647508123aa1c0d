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
    names, ends = frozenset(choice), _ends_like(choice)
    return lambda path: not names.isdisjoint(ends(path))


def by_name(names: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths that each of these names means, if any: what `named` says of many names and many paths.

    >>> by_name(["q_proj", "k_proj"], ["0.q_proj", "1.q_proj"])
    {'q_proj': ['0.q_proj', '1.q_proj']}
    """
    asked, found = frozenset(names), {}
    ends = _ends_like(asked)
    for path in paths:
        for end in ends(path):
            if end in asked:
                found.setdefault(end, []).append(path)
    return found


def _ends_like(names: Iterable[str]) -> Callable[[str], Iterable[str]]:
    """What ends of a path may be one of these names: its last part alone, where no name has a dot."""
    return ends_of if any("." in name for name in names) else lambda path: (path[path.rfind(".") + 1 :],)


def inside(path: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of the roots or lies below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)

"""Sentences about names that match nothing, with what may have been meant."""

from collections import Counter
from collections.abc import Iterable

import regex

from veneer.config import ALL_LINEAR
from veneer.suggest import closest

_SPECIAL = regex.compile(r"[\\*+?^$|()\[\]{}]")


def explain_unmatched(field: str, name: str, paths: Iterable[str], *, is_pattern: bool = False) -> str:
    """One line about a name (or a regular expression) of `field` that means none of the paths."""
    paths = list(paths)
    ends = Counter(path.rpartition(".")[2] for path in paths)
    found = closest(name.rpartition(".")[2], ends)
    if name.lower() == ALL_LINEAR:
        return f"{field}: {name!r} is not the name of a layer; give it alone as target_modules, not in a list"
    if field != "target_modules" and not _SPECIAL.search(name) and any(f".{name}." in f".{path}" for path in paths):
        pattern = rf"(.*\.)?{regex.escape(name)}\..*"
        return (
            f"{field}: {name!r} holds layers but is none; for those inside it write {field}={_as_given(field, pattern)}"
        )
    if is_pattern and not _SPECIAL.search(name) and name in ends:
        return f"{field}: {name!r} is a string, so a regular expression for the whole path; write [{name!r}] for a name"
    if found:
        hints = " or ".join(f"{end} ({_count(ends[end])})" for end in found)
        return f"{field}: {name!r} matches nothing; did you mean {hints}?"
    if not is_pattern and _SPECIAL.search(name) and field in ("target_modules", "exclude_modules"):
        return f"{field}: {name!r} matches nothing; an entry of a list is a name, give a regular expression as a string"
    most = ", ".join(f"{end} ({_count(n)})" for end, n in ends.most_common(12))
    return f"{field}: {name!r} matches nothing; there are {most or 'no candidates'}"


def some(paths: list[str]) -> str:
    """The first path, and how many more there are."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _as_given(field: str, pattern: str) -> str:
    return f"{{{pattern!r}: …}}" if field.endswith("_pattern") else repr(pattern)


def _count(n: int) -> str:
    return f"{n} layer" if n == 1 else f"{n} layers"

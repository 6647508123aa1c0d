"""Regular expressions over module paths, each with a limit on its length and its time."""

import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import regex

from veneer.errors import ConfigError

SECONDS = 1.0  # how long one regular expression may take on one name
LONGEST = 1000  # characters

# A pattern key that is a name: its dots stand for any character, those after a backslash for dots.
_NAME = regex.compile(r"\^?(?:[^\\*+?^$|()\[\]{}.\n]|\\?\.)+")


def matches_end(pattern: str, path: str) -> bool:
    """Whether a pattern key (a name or a regular expression) matches the end of a path, at a dot."""
    return matches(_at_end(pattern), path)


def ends_of(path: str) -> list[str]:
    """The ends of a path at dots, shortest first.

    >>> ends_of("layers.0.q_proj")
    ['q_proj', '0.q_proj', 'layers.0.q_proj']
    """
    ends, dot = [], path.rfind(".")
    while dot >= 0:
        ends.append(path[dot + 1 :])
        dot = path.rfind(".", 0, dot)
    return [*ends, path]


def first_match(keys: Collection[str], path: str) -> str | None:
    """The first of the pattern keys that matches the end of a path, as `matches_end` says; None if none does.

    Keys that are names are looked up, so that a model may have one for each of its layers.
    """
    if not keys:
        return None
    table = _table(tuple(keys))
    best = min(table.names_of(path), default=None)
    for place, key in table.expressions:
        if best is not None and place > best:
            break
        if matches_end(key, path):
            return key
    return None if best is None else table.keys[best]


def all_matches(keys: Collection[str], paths: Collection[str]) -> set[str]:
    """The pattern keys that match the end of any path, whichever come before them."""
    if not keys:
        return set()
    table = _table(tuple(keys))
    found = {table.keys[place] for path in paths for place in table.names_of(path)}
    return found | {key for _, key in table.expressions if any(matches_end(key, path) for path in paths)}


# How a name is looked up: whether it is the whole path, its length, and where it has dots that stand for any character.
_Form = tuple[bool, int, tuple[int, ...]]


@dataclass
class _Table:
    """Pattern keys in their order, such that names are found without trying each.

    expressions  (place, key) of those that must be tried
    names        {name: place} of the others, by their form
    forms        the forms there are, by what tells them without looking at dots
    """

    keys: tuple[str, ...]
    expressions: list[tuple[int, str]] = field(default_factory=list)
    names: dict[_Form, dict[str, int]] = field(default_factory=dict)
    forms: dict[tuple[bool, int], list[_Form]] = field(default_factory=dict)

    def add(self, place: int, key: str) -> None:
        """Enter a key."""
        if not _NAME.fullmatch(key):
            self.expressions.append((place, key))
            return
        whole = key.startswith("^")
        letters = regex.findall(r"\\?.", key.removeprefix("^"))
        form = whole, len(letters), tuple(index for index, letter in enumerate(letters) if letter == ".")
        if form not in self.names:
            self.forms.setdefault(form[:2], []).append(form)
        name = "".join(letter[-1] for letter in letters)
        self.names.setdefault(form, {}).setdefault(name, place)

    def names_of(self, path: str) -> list[int]:
        """The places of the keys that are names and match the end of a path."""
        found = (
            self.names[form].get(_with_dots(end, form[2]))
            for whole, end in [*((False, end) for end in ends_of(path)), (True, path)]
            for form in self.forms.get((whole, len(end)), ())
        )
        return [place for place in found if place is not None]


@lru_cache(maxsize=8)
def _table(keys: tuple[str, ...]) -> _Table:
    table = _Table(keys)
    for place, key in enumerate(keys):
        table.add(place, key)
    return table


def _with_dots(name: str, places: Iterable[int]) -> str:
    letters = list(name)
    for place in places:
        letters[place] = "."
    return "".join(letters)


def _at_end(pattern: str) -> str:
    return rf"(?:.*\.)?(?:{pattern})"


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a whole path. Raises ConfigError if that takes over a second."""
    return whole_match(pattern, path) is not None


def whole_match(pattern: str, path: str) -> regex.Match[str] | None:
    """The match of a regular expression with a whole path. Raises ConfigError if that takes over a second."""
    try:
        return _compiled(pattern).fullmatch(path, timeout=SECONDS)
    except TimeoutError:
        raise ConfigError(
            f"The pattern {pattern!r} takes over {SECONDS:g} s on {path!r}. "
            "Nested repetitions such as (a+)+ do that; write it without them."
        ) from None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def pattern_fault(value: str) -> str | None:
    """Why a text is no regular expression, here and for PEFT, which reads the file with `re`; None if it is one."""
    if len(value) > LONGEST:
        return f"{value[:40]!r}… has {len(value):,} characters, at most {LONGEST:,} are allowed"
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(value)
            regex.compile(value)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return f"{value!r} is not a regular expression: {error}"
    return None

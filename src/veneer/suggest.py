"""Did you mean …? The one place that guesses what a misspelt name was meant to be."""

from collections.abc import Iterable
from difflib import SequenceMatcher

_CLOSE = 0.6


def closest(name: str, known: Iterable[str], *, limit: int = 1) -> list[str]:
    """The known names most like `name`, best first; empty if none is close.

    >>> closest("q_porj", ["q_proj", "v_proj", "lm_head"])
    ['q_proj']
    """

    found: list[tuple[float, str]] = []
    for candidate in set(known):
        likeness = SequenceMatcher(None, name.lower(), candidate.lower())
        # each is a bound of the next, and takes longer
        if likeness.real_quick_ratio() >= _CLOSE and likeness.quick_ratio() >= _CLOSE and likeness.ratio() >= _CLOSE:
            found.append((-likeness.ratio(), candidate))
    return [candidate for _, candidate in sorted(found)[:limit]]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"`, or an empty string if no known name is close."""
    found = closest(name, known)
    return f", did you mean {found[0]!r}?" if found else ""

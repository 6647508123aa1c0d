"""Did you mean …? The one place that guesses what a misspelt name was meant to be."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def closest(name: str, known: Iterable[str], *, limit: int = 1) -> list[str]:
    """The known names most like `name`, best first; empty if none is close.

    >>> closest("q_porj", ["q_proj", "v_proj", "lm_head"])
    ['q_proj']
    """

    def likeness(candidate: str) -> float:
        return SequenceMatcher(None, name.lower(), candidate.lower()).ratio()

    ranked = sorted(set(known), key=lambda candidate: (-likeness(candidate), candidate))
    return [candidate for candidate in ranked[:limit] if likeness(candidate) >= 0.6]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"`, or an empty string if no known name is close."""
    found = closest(name, known)
    return f", did you mean {found[0]!r}?" if found else ""

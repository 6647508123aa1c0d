"""How well JSON answers agree with the expected ones.

An answer counts as JSON only if it is one object and nothing else: no words around it, no code fence.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares between 0 and 1 over `rows` answers.

    valid: the answer is one JSON object; exact: it equals the expected object; f1: micro-averaged over all
    (key, value) pairs, where a pair counts if both key and value are exactly right.
    """

    rows: int
    valid: float
    exact: float
    f1: float


def parse_object(text: str) -> dict[str, object] | None:
    """The JSON object the text is, or None.

    >>> parse_object(' {"zip": "60622"} ')
    {'zip': '60622'}
    >>> parse_object('Sure! {"zip": "60622"}') is None
    True
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def score(answers: Sequence[str], expected: Sequence[str]) -> Scores:
    """Scores of the answers; the expected texts must be JSON objects."""
    assert len(answers) == len(expected) > 0
    found = [parse_object(answer) for answer in answers]
    wanted = [json.loads(text) for text in expected]
    pairs_found = [_pairs(value or {}) for value in found]
    pairs_wanted = [_pairs(value) for value in wanted]
    hits = sum(len(ours & theirs) for ours, theirs in zip(pairs_found, pairs_wanted, strict=True))
    total = sum(map(len, pairs_found)) + sum(map(len, pairs_wanted))
    return Scores(
        rows=len(answers),
        valid=sum(value is not None for value in found) / len(found),
        exact=sum(ours == theirs for ours, theirs in zip(found, wanted, strict=True)) / len(found),
        f1=2 * hits / total if total else 0.0,
    )


def _pairs(value: dict[str, object]) -> set[tuple[str, str]]:
    return {(key, json.dumps(item, sort_keys=True)) for key, item in value.items()}

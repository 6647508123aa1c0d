"""Regular expressions over module paths, each with a limit on its length and its time."""

import re
import warnings

import regex

from veneer.errors import ConfigError

SECONDS = 1.0  # how long one regular expression may take on one name
LONGEST = 1000  # characters


def matches_end(pattern: str, path: str) -> bool:
    """Whether a pattern key (a name or a regular expression) matches the end of a path, at a dot."""
    return matches(rf"(?:.*\.)?(?:{pattern})", path)


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a whole path. Raises ConfigError if that takes over a second."""
    return whole_match(pattern, path) is not None


def whole_match(pattern: str, path: str) -> regex.Match[str] | None:
    """The match of a regular expression with a whole path. Raises ConfigError if that takes over a second."""
    try:
        return regex.fullmatch(pattern, path, timeout=SECONDS)
    except TimeoutError:
        raise ConfigError(
            f"The pattern {pattern!r} takes over {SECONDS:g} s on {path!r}. "
            "Nested repetitions such as (a+)+ do that; write it without them."
        ) from None


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

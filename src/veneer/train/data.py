"""Rows of a training file: read, checked, every problem named by its line.

    {"prompt": "2 + 2 =", "completion": "4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

`.jsonl` holds one row a line, `.json` one list of rows; UTF-8, with or without a byte order mark. One file, one format.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from veneer.errors import DataError, bullet_list
from veneer.suggest import did_you_mean
from veneer.train.row_check import Format, Problem, check, kind

SHOWN_PROBLEMS = 10
SHOWN_PLACES = 3


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form chat templates read."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: a conversation whose last message is the assistant's.

    `place` names where it came from ("line 3"); `plain` says that it was a prompt and a completion, so that a model
    without a chat template can read it as running text.
    """

    messages: tuple[Message, ...]
    place: str
    plain: bool


def read_rows(path: Path) -> list[Row]:
    """All rows of a .json or .jsonl file, in order.

    Raises DataError that lists the problems by line (the first ten, and how many there are), equal ones together.
    """
    problems: dict[Problem, list[str]] = {}
    rows: list[Row] = []
    values = list(_values(path))
    first: tuple[Format, str] | None = None
    for place, value, problem in values:
        form, found = (None, [problem]) if problem else check(value)
        if form and first and form != first[0]:
            found = [Problem(f"has the format {form}, but {first[1]} has {first[0]}: one file, one format")]
        if form and first is None:
            first = form, place
        for each in found:
            problems.setdefault(each, []).append(place)
        if form and not found:
            rows.append(_row(value, form, place))
    if problems:
        raise DataError(_summary(path, problems, len(values)))
    if not rows:
        raise DataError(f"{path} holds no rows. Write one JSON object a line, with the keys 'prompt' and 'completion'.")
    return rows


def _summary(path: Path, problems: dict[Problem, list[str]], rows: int) -> str:
    lines = [_in_one_line(problem, places, rows) for problem, places in problems.items()]
    shown = lines[:SHOWN_PROBLEMS]
    if len(lines) > len(shown):
        shown = [*shown, f"… and {len(lines) - len(shown)} more"]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return bullet_list(f"{path} cannot be used: {count}.", shown)


def _in_one_line(problem: Problem, places: list[str], rows: int) -> str:
    """A problem with its place, or with those of all the rows that share it."""
    if len(places) == 1:
        return f"{places[0]}: {problem.what}{problem.advice}"
    how_many = f"all {rows} rows" if len(places) == rows else f"{len(places)} of {rows} rows"
    word, numbers = places[0].split()[0], [place.split()[1] for place in places[:SHOWN_PLACES]]
    more = ", …" if len(places) > SHOWN_PLACES else ""
    return f"{problem.what} in {how_many} ({word} {', '.join(numbers)}{more}){problem.advice}"


class _Value(NamedTuple):
    """A row as it was read; the problem is None where the JSON could be."""

    place: str
    value: Any
    problem: Problem | None = None


def _values(path: Path) -> Iterator[_Value]:
    readers = {".jsonl": _lines, ".json": _items}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} must end in .jsonl (one JSON object a line) or .json (one list of objects).")
    yield from readers[path.suffix.lower()](_text(path), path)


def _text(path: Path) -> str:
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.json*")) if path.parent.is_dir() else []
        raise DataError(f"There is no data file {path}{did_you_mean(path.name, near) or '.'}")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} is not UTF-8 text (line {line}). Save it as UTF-8.") from None


def _lines(text: str, path: Path) -> Iterator[_Value]:
    if text.lstrip().startswith("[") and isinstance(_parsed(text), list):
        raise DataError(f"{path} holds one list of rows, not one row a line: rename it {path.stem}.json.")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _Value(f"line {number}", _read(line))
        except (ValueError, RecursionError) as error:
            yield _Value(f"line {number}", None, _json_problem(error))


def _items(text: str, path: Path) -> Iterator[_Value]:
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(isinstance(_parsed(line), dict) for line in lines[:2]):
        raise DataError(f"{path} holds one row a line, not one list of rows: rename it {path.stem}.jsonl.")
    try:
        items = _read(text)
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "the file"
        yield _Value(line, None, _json_problem(error))
        return
    if not isinstance(items, list):
        raise DataError(f"{path} must hold a list of rows, not {kind(items)}. For one object a line name it .jsonl.")
    for number, item in enumerate(items, start=1):
        yield _Value(f"row {number}", item)


def _read(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_refuse_duplicates)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is written twice")
        found[key] = value
    return found


def _parsed(text: str) -> Any:
    """The value, or None where the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_problem(error: Exception) -> Problem:
    if isinstance(error, json.JSONDecodeError):
        return Problem(f"not valid JSON ({error.msg}, column {error.colno})")
    return Problem(f"not valid JSON ({'nested too deeply' if isinstance(error, RecursionError) else error})")


def _row(value: dict[str, Any], form: Format, place: str) -> Row:
    if form == "messages":
        messages = tuple(Message(m["role"], m["content"]) for m in value["messages"])
        return Row(messages, place, plain=False)
    messages = Message("user", value["prompt"]), Message("assistant", value["completion"])
    return Row(messages, place, plain=True)

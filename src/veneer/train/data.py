"""Rows of a training file: read, checked, every problem named by its line.

    {"prompt": "2 + 2 =", "completion": "4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

`.jsonl` holds one row a line, `.json` one list of rows; UTF-8, with or without a byte order mark. One file, one format.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.errors import DataError, bullet_list
from veneer.suggest import did_you_mean

ROLES = ("system", "user", "assistant")
SHOWN_PROBLEMS = 10

Format = Literal["prompt/completion", "messages"]
KEYS: dict[Format, tuple[str, ...]] = {"prompt/completion": ("prompt", "completion"), "messages": ("messages",)}
ALL_KEYS = tuple(key for keys in KEYS.values() for key in keys)

JSON_WORDS = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


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

    Raises DataError that lists the problems by line (the first ten, and how many there are).
    """
    problems: list[str] = []
    rows: list[Row] = []
    first: tuple[Format, str] | None = None
    for place, value, problem in _values(path):
        form, found = (None, [problem]) if problem else _check(value)
        if form and first and form != first[0]:
            found = [f"has the format {form}, but {first[1]} has {first[0]}: one file, one format"]
        if form and first is None:
            first = form, place
        problems += [f"{place}: {text}" for text in found]
        if form and not found:
            rows.append(_row(value, form, place))
    if problems:
        raise DataError(_summary(path, problems))
    if not rows:
        raise DataError(f"{path} holds no rows. Write one JSON object a line, with the keys 'prompt' and 'completion'.")
    return rows


def _summary(path: Path, problems: list[str]) -> str:
    shown = problems[:SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown = [*shown, f"… and {len(problems) - len(shown)} more"]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return bullet_list(f"{path} cannot be used: {count}.", shown)


def _values(path: Path) -> Iterator[tuple[str, Any, str]]:
    """(place, value, problem) for each row; the problem is empty where the JSON could be read."""
    readers = {".jsonl": _lines, ".json": _items}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} must end in .jsonl (one JSON object a line) or .json (one list of objects).")
    yield from readers[path.suffix.lower()](_text(path), path)


def _text(path: Path) -> str:
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.json*")) if path.parent.is_dir() else []
        raise DataError(f"There is no data file {path}{did_you_mean(path.name, near)}.")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} is not UTF-8 text (line {line}). Save it as UTF-8.") from None


def _lines(text: str, path: Path) -> Iterator[tuple[str, Any, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line), ""
        except ValueError as error:
            yield f"line {number}", None, _json_problem(error)


def _items(text: str, path: Path) -> Iterator[tuple[str, Any, str]]:
    try:
        items = json.loads(text)
    except ValueError as error:
        line = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "the file"
        yield line, None, _json_problem(error)
        return
    if not isinstance(items, list):
        raise DataError(f"{path} must hold a list of rows, not {_kind(items)}. For one object a line name it .jsonl.")
    for number, item in enumerate(items, start=1):
        yield f"row {number}", item, ""


def _json_problem(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    return f"not valid JSON ({error})"


def _kind(value: Any) -> str:
    return "null" if value is None else JSON_WORDS[type(value)]


def _check(value: Any) -> tuple[Format | None, list[str]]:
    """The format of one row and what is wrong with it."""
    if not isinstance(value, dict):
        return None, [f"expected an object with the keys 'prompt' and 'completion', got {_kind(value)}"]
    form: Format = "messages" if "messages" in value else "prompt/completion"
    unknown = [key for key in value if key not in ALL_KEYS]
    found = [f"unknown key {key!r}{did_you_mean(key, ALL_KEYS) or _known(form)}" for key in unknown]
    if form == "messages" and not value.keys().isdisjoint(KEYS["prompt/completion"]):
        return None, [*found, "has both 'messages' and 'prompt'/'completion': keep one of them"]
    if form == "messages":
        return form, found + _check_messages(value["messages"])
    meant = " ".join(found)
    for key in KEYS[form]:
        if key in value:
            found += _check_text(key, value[key], may_be_empty=False)
        elif f"did you mean {key!r}" not in meant:
            found.append(f"the key {key!r} is missing")
    return (form if not unknown or not value.keys().isdisjoint(ALL_KEYS) else None), found


def _known(form: Format) -> str:
    return " (allowed: " + ", ".join(repr(key) for key in KEYS[form]) + ")"


def _check_text(name: str, value: Any, *, may_be_empty: bool) -> list[str]:
    if not isinstance(value, str):
        return [f"{name!r} must be a string, got {_kind(value)}"]
    if not may_be_empty and not value.strip():
        return [f"{name!r} is empty"]
    return []


def _check_messages(messages: Any) -> list[str]:
    if not isinstance(messages, list) or not messages:
        return ["'messages' must be a list of at least one {'role': …, 'content': …}"]
    found = [
        f"message {number}: {text}"
        for number, message in enumerate(messages, start=1)
        for text in _check_message(message)
    ]
    if not found and messages[-1]["role"] != "assistant":
        found.append(f"the last message must be the assistant's, it is the {messages[-1]['role']}'s")
    return found


def _check_message(message: Any) -> list[str]:
    if not isinstance(message, dict):
        return [f"expected an object with 'role' and 'content', got {_kind(message)}"]
    keys = ("role", "content")
    found = [f"unknown key {key!r}{did_you_mean(key, keys)}" for key in message if key not in keys]
    found += [f"the key {key!r} is missing" for key in keys if key not in message]
    if found:
        return found
    role = message["role"]
    if role not in ROLES:
        guess = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        found.append(f"unknown role {role!r}{guess or ' (allowed: ' + ', '.join(ROLES) + ')'}")
    return found + _check_text("content", message["content"], may_be_empty=role != "assistant")


def _row(value: dict[str, Any], form: Format, place: str) -> Row:
    if form == "messages":
        messages = tuple(Message(m["role"], m["content"]) for m in value["messages"])
        return Row(messages, place, plain=False)
    messages = Message("user", value["prompt"]), Message("assistant", value["completion"])
    return Row(messages, place, plain=True)

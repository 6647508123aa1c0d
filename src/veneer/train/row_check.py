"""What is wrong with one row of a training file, in words."""

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from veneer.suggest import did_you_mean

ROLES = ("system", "user", "assistant")

Format = Literal["prompt/completion", "messages"]
KEYS: dict[Format, tuple[str, ...]] = {"prompt/completion": ("prompt", "completion"), "messages": ("messages",)}
ALL_KEYS = tuple(key for keys in KEYS.values() for key in keys)
MESSAGE_KEYS = ("role", "content")

RENAMED = {  # what other data sets call our keys
    "question": "prompt",
    "instruction": "prompt",
    "input": "prompt",
    "output": "completion",
    "answer": "completion",
    "response": "completion",
    "target": "completion",
    "conversations": "messages",
    "conversation": "messages",
}
RENAMED_IN_MESSAGES = {"from": "role", "value": "content"}
RENAMED_ROLES = {"human": "user", "gpt": "assistant", "ai": "assistant", "model": "assistant"}

JSON_WORDS = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Problem(NamedTuple):
    """What is wrong, and what to do about it; rows may share it, and the places are named between the two."""

    what: str
    advice: str = ""
    meant: str = ""  # the key that an unknown one stands for


def check(value: Any) -> tuple[Format | None, list[Problem]]:
    """The format of one row and what is wrong with it."""
    if not isinstance(value, dict):
        return None, [Problem(f"expected an object with the keys 'prompt' and 'completion', got {kind(value)}")]
    form: Format = "messages" if "messages" in value else "prompt/completion"
    unknown = [key for key in value if key not in ALL_KEYS]
    found = [_unknown_key(key, value, form) for key in unknown]
    if form == "messages" and not value.keys().isdisjoint(KEYS["prompt/completion"]):
        return None, [*found, Problem("has both 'messages' and 'prompt'/'completion': keep one of them")]
    if form == "messages":
        return form, found + _check_messages(value["messages"])
    meant = {problem.meant for problem in found}
    for key in KEYS[form]:
        if key in value:
            found += check_text(key, value[key], may_be_empty=False)
        elif not meant & {key, "messages"}:
            found.append(Problem(f"the key {key!r} is missing"))
    return (form if not unknown or not value.keys().isdisjoint(ALL_KEYS) else None), found


def kind(value: Any) -> str:
    """What JSON calls the value."""
    return "null" if value is None else JSON_WORDS[type(value)]


def check_text(name: str, value: Any, *, may_be_empty: bool) -> list[Problem]:
    """What is wrong with a value that should be text."""
    if not isinstance(value, str):
        return [Problem(f"{name!r} must be a string, got {kind(value)}")]
    if not may_be_empty and not value.strip():
        return [Problem(f"{name!r} is empty")]
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        return [Problem(f"{name!r} holds {half}, which is half a character: a surrogate without the other one")]
    return []


def _unknown_key(key: str, row: Mapping[str, Any], form: Format) -> Problem:
    what = f"unknown key {key!r}"
    if key == "text" and row.keys().isdisjoint(ALL_KEYS):
        return Problem(what, ": split it into 'prompt', which is read, and 'completion', which is learned", "messages")
    if {"instruction", "input"} <= row.keys() and key in ("instruction", "input"):
        return Problem(what, ": join 'instruction' and 'input' into 'prompt'", "prompt")
    if key in RENAMED and row.keys().isdisjoint(KEYS["messages"]) and RENAMED[key] not in row:
        return Problem(what, f": rename it {RENAMED[key]!r}", RENAMED[key])
    return _misspelt(what, key, [known for known in ALL_KEYS if known not in row], KEYS[form])


def _misspelt(what: str, key: str, missing: Collection[str], allowed: Collection[str]) -> Problem:
    guess = did_you_mean(key, missing)
    if guess:
        return Problem(what, guess, guess.split("'")[1])
    return Problem(what, f": remove it (allowed: {', '.join(map(repr, allowed))})")


def _check_messages(messages: Any) -> list[Problem]:
    if not isinstance(messages, list) or not messages:
        return [Problem("'messages' must be a list of at least one {'role': …, 'content': …}")]
    found = [
        problem._replace(what=f"message {number}: {problem.what}")
        for number, message in enumerate(messages, start=1)
        for problem in _check_message(message)
    ]
    if not found and messages[-1]["role"] != "assistant":
        found.append(Problem(f"the last message must be the assistant's, it is the {messages[-1]['role']}'s"))
    return found


def _check_message(message: Any) -> list[Problem]:
    if not isinstance(message, dict):
        return [Problem(f"expected an object with 'role' and 'content', got {kind(message)}")]
    found = [_unknown_message_key(key, message) for key in message if key not in MESSAGE_KEYS]
    meant = {problem.meant for problem in found}
    missing = [key for key in MESSAGE_KEYS if key not in message and key not in meant]
    found += [Problem(f"the key {key!r} is missing") for key in missing]
    if found:
        return found
    role = message["role"]
    if role not in ROLES:
        found.append(_unknown_role(role))
    return found + check_text("content", message["content"], may_be_empty=role != "assistant")


def _unknown_message_key(key: str, message: Mapping[str, Any]) -> Problem:
    what = f"unknown key {key!r}"
    new = RENAMED_IN_MESSAGES.get(key)
    if new and new not in message:
        return Problem(what, f": rename it {new!r}", new)
    return _misspelt(what, key, [known for known in MESSAGE_KEYS if known not in message], MESSAGE_KEYS)


def _unknown_role(role: Any) -> Problem:
    what = f"unknown role {role!r}"
    if not isinstance(role, str):
        return Problem(what, f" (allowed: {', '.join(ROLES)})")
    if role in RENAMED_ROLES:
        return Problem(what, f": rename it {RENAMED_ROLES[role]!r}")
    return Problem(what, did_you_mean(role, ROLES) or f" (allowed: {', '.join(ROLES)})")

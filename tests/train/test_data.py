import json
from pathlib import Path

import pytest

from veneer.errors import DataError
from veneer.train.data import Message, read_rows

GOOD = {"prompt": "2+2", "completion": "4"}
CHAT = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}


def write(folder: Path, *lines: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_prompt_and_completion_become_a_conversation(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, GOOD))
    assert row.messages == (Message("user", "2+2"), Message("assistant", "4"))
    assert row.plain
    assert row.place == "line 1"


def test_messages_are_kept(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, CHAT))
    assert [message.as_dict() for message in row.messages] == CHAT["messages"]
    assert not row.plain


def test_blank_lines_are_skipped_and_lines_still_counted(tmp_path: Path) -> None:
    assert [row.place for row in read_rows(write(tmp_path, "", GOOD, "  ", GOOD, ""))] == ["line 2", "line 4"]


def test_a_json_file_holds_a_list(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, [GOOD, GOOD], name="rows.json"))
    assert [row.place for row in rows] == ["row 1", "row 2"]


def test_a_byte_order_mark_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "é", "completion": "ü"}, ensure_ascii=False).encode())
    assert read_rows(path)[0].messages[0].content == "é"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "completion": "b"', "line 2: not valid JSON (Expecting ',' delimiter, column 34)"),
        ('{"prompt": "a" "completion": "b"}', "line 2: not valid JSON"),
        ([1, 2], "line 2: expected an object with the keys 'prompt' and 'completion', got a list"),
        ("null", "line 2: expected an object with the keys 'prompt' and 'completion', got null"),
        ({"promt": "a", "completion": "b"}, "line 2: unknown key 'promt', did you mean 'prompt'?"),
        ({"prompt": "a"}, "line 2: the key 'completion' is missing"),
        ({**GOOD, "id": 7}, "line 2: unknown key 'id': remove it (allowed: 'prompt', 'completion')"),
        (
            '{"prompt": "a", "prompt": "b", "completion": "c"}',
            "line 2: not valid JSON (the key 'prompt' is written twice)",
        ),
        ({"prompt": "a\ud83d", "completion": "b"}, "line 2: 'prompt' holds \\ud83d, which is half a character"),
        ("[" * 100_000, "line 2: not valid JSON (nested too deeply)"),
        ({"text": "a"}, "line 2: unknown key 'text': split it into 'prompt', which is read, and 'completion', which"),
        ({"conversations": []}, "line 2: unknown key 'conversations': rename it 'messages'"),
        ({"prompt": "a", "answer": "b"}, "line 2: unknown key 'answer': rename it 'completion'"),
        ({"prompt": "a", "completion": 4}, "line 2: 'completion' must be a string, got a number"),
        ({"prompt": True, "completion": "b"}, "line 2: 'prompt' must be a string, got true or false"),
        ({"prompt": "a", "completion": "  "}, "line 2: 'completion' is empty"),
        (CHAT, "line 2: has the format messages, but line 1 has prompt/completion: one file, one format"),
        ({**GOOD, **CHAT}, "line 2: has both 'messages' and 'prompt'/'completion': keep one of them"),
    ],
)
def test_a_broken_row_is_named_with_its_line(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, GOOD, line, GOOD))
    assert said in str(caught.value)
    assert "1 problem." in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "'messages' must be a list of at least one"),
        ("hello", "'messages' must be a list of at least one"),
        ([{"role": "user", "content": "a"}], "the last message must be the assistant's, it is the user's"),
        ([{"role": "asistant", "content": "a"}], "message 1: unknown role 'asistant', did you mean 'assistant'?"),
        ([{"role": "bot", "content": "a"}], "message 1: unknown role 'bot' (allowed: system, user, assistant)"),
        ([{"role": "assistant", "contnt": "a"}], "message 1: unknown key 'contnt', did you mean 'content'?"),
        ([{"role": "assistant", "content": None}], "message 1: 'content' must be a string, got null"),
        ([{"role": "assistant", "content": ""}], "message 1: 'content' is empty"),
        ([{"from": "human", "content": "a"}], "message 1: unknown key 'from': rename it 'role'"),
        ([{"role": "gpt", "content": "a"}], "message 1: unknown role 'gpt': rename it 'assistant'"),
        (["hi"], "message 1: expected an object with 'role' and 'content', got a string"),
    ],
)
def test_a_broken_conversation_is_named(tmp_path: Path, messages: object, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, {"messages": messages}))
    assert f"line 1: {said}" in str(caught.value)


def test_all_problems_are_collected_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, GOOD, *[{**GOOD, f"id{n}": 7} for n in range(14)]))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("cannot be used: 14 problems.")
    assert lines[1].strip().startswith("line 2: ")
    assert len(lines) == 12
    assert lines[-1].strip() == "… and 4 more"


def test_what_rows_share_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, *[{**GOOD, "source": "x"}] * 20))
    assert str(caught.value).splitlines()[1:] == [
        "  unknown key 'source' in all 20 rows (line 1, 2, 3, …): remove it (allowed: 'prompt', 'completion')"
    ]
    with pytest.raises(DataError, match=r"'completion' is empty in 2 of 3 rows \(row 2, 3\)"):
        read_rows(write(tmp_path, [GOOD, *[{"prompt": "a", "completion": ""}] * 2], name="rows.json"))


def test_the_columns_of_other_data_sets_are_told_how_to_be_renamed(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, {"instruction": "a", "input": "b", "output": "c"}))
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "line 1: unknown key 'instruction': join 'instruction' and 'input' into 'prompt'",
        "line 1: unknown key 'input': join 'instruction' and 'input' into 'prompt'",
        "line 1: unknown key 'output': rename it 'completion'",
    ]
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, {"question": "a", "answer": "c"}))
    assert "rename it 'prompt'" in str(caught.value)
    assert "missing" not in str(caught.value)


def test_a_file_of_the_other_kind_should_be_renamed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds one list of rows, not one row a line: rename it rows.json\\."):
        read_rows(write(tmp_path, json.dumps([GOOD, GOOD], indent=2)))
    with pytest.raises(DataError, match="holds one row a line, not one list of rows: rename it rows.jsonl\\."):
        read_rows(write(tmp_path, GOOD, GOOD, name="rows.json"))


def test_a_missing_file_is_named_with_its_likely_neighbour(tmp_path: Path) -> None:
    write(tmp_path, GOOD, name="train.jsonl")
    with pytest.raises(DataError, match=r"no data file .*trian.jsonl, did you mean 'train.jsonl'\?$"):
        read_rows(tmp_path / "trian.jsonl")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(write(tmp_path, "", ""))


def test_bytes_that_are_not_text_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe")
    with pytest.raises(DataError, match=r"not UTF-8 text \(line 2\)"):
        read_rows(path)


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in .jsonl"):
        read_rows(write(tmp_path, GOOD, name="rows.csv"))


def test_a_json_object_instead_of_a_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold a list of rows, not an object"):
        read_rows(write(tmp_path, GOOD, name="rows.json"))

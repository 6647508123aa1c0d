"""The demonstration's own logic on the tiny model; the real one is slow and run by `make demo`."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from veneer.errors import MergeError, RunError
from veneer.train import demo
from veneer.train.demo_picture import draw_before_after
from veneer.train.demo_view import as_called, show_before, show_report
from veneer.train.progress import Progress

SIZE = demo.Size(train_rows=8, batch_size=4, learning_rate=1e-2, scored_rows=4, merged_rows=2, max_new_tokens=4)


@pytest.fixture(autouse=True)
def tiny(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "small_model", lambda progress: chat_model)


def test_it_trains_scores_merges_and_says_where_everything_lies(tmp_path: Path) -> None:
    seen: list[demo.Exam] = []
    report = demo.run(tmp_path / "out", SIZE, on_before=seen.append)
    assert seen[0].scores == report.before.scores
    assert len(report.after.answers) == 4
    written = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert written["steps"] == 2
    assert {"total", "train", "answer before"} <= written["seconds"].keys()
    text = StringIO()
    console = Console(file=text, width=200)
    show_before(console, report.before)
    show_report(console, report)
    for part in ("field F1", "4 held-out addresses", str(report.merged_dir), "veneer chat", "2 of 2"):
        assert part in text.getvalue()
    draw_before_after(report, tmp_path / "out" / "before-after.png")
    assert (tmp_path / "out" / "before-after.png").read_bytes().startswith(b"\x89PNG")
    for name in ("adapter", "merged", "loss.png", "log.jsonl", "run.yaml", "addresses.jsonl"):
        assert (tmp_path / "out" / name).exists()
    demo.run(tmp_path / "out", SIZE)  # its own folder may be used again


def test_the_next_commands_begin_as_this_one_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / ".venv" / "bin" / "veneer"), "demo"])
    monkeypatch.setenv("PATH", "")
    assert as_called() == ".venv/bin/veneer"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert as_called() == "veneer"


def test_it_does_not_write_into_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RunError, match="not from an earlier demo"):
        demo.run(tmp_path, SIZE)


def test_a_merged_model_that_answers_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(adapted, tokenizer, folder: Path) -> None:
        adapted.unload().save_pretrained(str(folder))

    monkeypatch.setattr(demo, "_merge", forget)
    size = demo.Size(train_rows=32, batch_size=4, learning_rate=1e-1, scored_rows=4, merged_rows=4, max_new_tokens=16)
    with pytest.raises(MergeError, match="questions otherwise than the adapter did"):
        demo.run(tmp_path / "out", size, progress=Progress())


def test_the_questions_name_the_keys_and_are_held_out() -> None:
    train = {row.messages[1].content for row in demo._rows("train.jsonl", 320)}
    test = demo._rows("test.jsonl", 64)
    assert len(test) == 64
    assert not train & {row.messages[1].content for row in test}
    keys = {key for row in test for key in json.loads(row.messages[-1].content)}
    assert all(key in test[0].messages[0].content for key in keys)
    assert test[0].messages[0].role == "system"

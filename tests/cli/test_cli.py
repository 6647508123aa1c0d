"""The command line as a user meets it: what is printed, where, and with which exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from train.tiny_chat import write_rows
from veneer._version import __version__
from veneer.cli import main

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process; its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def run_yaml(chat_model: Path, rows_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    values = {
        "model": str(chat_model),
        "data": {"train": str(rows_file)},
        "lora": {"r": 4},
        "training": {"epochs": None, "max_steps": 2, "batch_size": 4, "learning_rate": "1e-2"},
        "output": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def adapter(cli: Cli, run_yaml: Path, tmp_path: Path) -> Path:
    assert cli("train", run_yaml)[0] == 0
    return tmp_path / "out" / "adapter"


HEAVY = {"torch", "transformers", "trl", "datasets", "matplotlib", "yaml", "numpy"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], HEAVY | {"pydantic"}),
        (["--version"], HEAVY | {"pydantic"}),
        (["train", "--help"], HEAVY),  # typer itself asks pydantic about the types of options
        (["inspect", "nowhere"], HEAVY),
    ],
)
def test_no_heavy_package_is_imported_where_none_is_needed(arguments: list[str], heavy: set[str]) -> None:
    code = (
        "import sys\nfrom veneer.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        f"found = sorted({heavy!r} & sys.modules.keys())\nsys.exit(repr(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command_and_is_plain_in_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "veneer.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    for command in ("demo", "init", "train", "chat", "targets", "inspect", "merge"):
        assert f" {command} " in done.stdout
    assert "\x1b" not in done.stdout


def test_version(cli: Cli) -> None:
    assert cli("--version")[:2] == (0, f"veneer {__version__}\n")


def test_init_writes_a_run_file_and_never_over_one(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    code, out, _ = cli("init", path)
    assert (code, f"veneer train {path}" in out) == (0, True)
    path.write_text("mine")
    code, _, err = cli("init", path)
    assert code == 2
    assert err.startswith(f"RunError: {path} exists already")
    assert path.read_text() == "mine"


def test_train_from_a_file_with_overrides(cli: Cli, run_yaml: Path, tmp_path: Path) -> None:
    code, out, _ = cli("train", run_yaml, "lora.r=2", f"output={tmp_path / 'other'}")
    assert code == 0
    assert f"Adapter: {tmp_path / 'other' / 'adapter'}" in out
    assert json.loads((tmp_path / "other" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert "\x1b" not in out


def test_a_misspelt_key_is_named_with_a_suggestion(cli: Cli, run_yaml: Path) -> None:
    run_yaml.write_text(run_yaml.read_text().replace("learning_rate", "learning_rat"))
    code, out, err = cli("train", run_yaml)
    assert (code, out) == (2, "")
    assert "training.learning_rat: unknown key, did you mean 'learning_rate'?" in err
    assert "Traceback" not in err


def test_a_broken_row_is_named_with_its_line(cli: Cli, run_yaml: Path, tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completon": "b"}])
    code, _, err = cli("train", run_yaml, f"data.train={bad}")
    assert code == 2
    assert "line 2: unknown key 'completon', did you mean 'completion'?" in err


def test_a_misspelt_target_is_named_with_a_suggestion(cli: Cli, chat_model: Path, run_yaml: Path) -> None:
    for command in (["targets", chat_model, "--target", "q_porj"], ["train", run_yaml, "lora.target_modules=[q_porj]"]):
        code, _, err = cli(*command)
        assert code == 2
        assert "q_porj" in err
        assert "did you mean q_proj (2 layers)?" in err


def test_a_truncated_adapter_file_is_named(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for command in (["inspect", adapter], ["merge", adapter, "--into", tmp_path / "m"], ["chat", adapter]):
        code, _, err = cli(*command)
        assert code == 2
        assert err.startswith("AdapterFileError: ")
        assert "adapter_model.safetensors" in err
    assert not (tmp_path / "m").exists()


def test_targets_shows_names_counts_shapes_and_totals(cli: Cli, chat_model: Path) -> None:
    code, out, _ = cli("targets", chat_model, "--target", "q_proj", "--target", "down_proj", "--rank", 4)
    assert code == 0
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│ ") and "proj" in line}
    assert rows.keys() == {"q_proj", "down_proj"}
    assert "32 x 32" in rows["q_proj"]
    assert f"{2 * 4 * (32 + 32)}" in rows["q_proj"]
    assert "32 x 48" in rows["down_proj"]
    assert f"{2 * 4 * (32 + 48):,}" in rows["down_proj"]
    assert "Not targeted: k_proj (2)" in out
    assert f"{2 * 4 * (32 + 32 + 32 + 48):,} of" in out


def test_targets_needs_only_a_config(cli: Cli, chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((chat_model / "config.json").read_bytes())
    code, out, _ = cli("targets", tmp_path)
    assert code == 0
    assert "o_proj" in out
    assert "lm_head" not in out


def test_inspect_shows_what_the_adapter_is(cli: Cli, adapter: Path, chat_model: Path) -> None:
    code, out, _ = cli("inspect", adapter)
    assert code == 0
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if line and line[0].isalpha())
    assert facts["model"].strip() == str(chat_model)
    assert facts["rank"].strip() == "4"
    assert facts["scale"].strip() == "8"
    per_layer = 4 * (4 * 32 + 2 * (16 + 32) + 3 * (32 + 48))
    assert facts["parameters"].strip() == f"{2 * per_layer:,}"
    assert "(F32)" in facts["tensors"]
    (row,) = [line for line in out.splitlines() if "q_proj" in line and "│" in line]
    assert [cell.strip() for cell in row.split("│")[1:5]] == ["q_proj", "2", "4", "32 x 32"]


def test_merge_writes_a_model_that_answers_like_the_adapter(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    into = tmp_path / "merged"
    code, out, _ = cli("merge", adapter, "--into", into)
    assert code == 0
    assert f"veneer chat {into}" in out
    said = cli("chat", adapter, "--prompt", "hi", "--max-new-tokens", 12)
    assert said[0] == 0
    assert cli("chat", into, "--prompt", "hi", "--max-new-tokens", 12)[1] == said[1]
    code, _, err = cli("merge", adapter, "--into", into)
    assert code == 2
    assert f"{into} is not empty" in err


def test_chat_reads_questions_from_a_pipe(
    cli: Cli, chat_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    asked = []

    def talk(text: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code, out, err = cli("chat", *arguments, "--max-new-tokens", 8)
        asked.append(err)
        assert code == 0
        return out

    once = talk("hi\n", chat_model)
    assert talk("hi\n/new\nhi\n/quit\nnever\n", chat_model) == once * 2
    assert talk("hi\n", chat_model, "--adapter", adapter) == talk("hi\n", adapter)
    assert talk("/system be brief\nhi\n", chat_model) == talk("hi\n", chat_model, "--system", "be brief")
    talk("/what\n", chat_model)
    assert "/new starts over" in asked[-1]


def test_a_conversation_longer_than_the_model_can_read_is_refused(cli: Cli, chat_model: Path) -> None:
    code, out, err = cli("chat", chat_model, "--prompt", "a" * 600)
    assert (code, out) == (2, "")
    assert "and the model can read at most 512 at once" in err
    code, _, err = cli("chat", chat_model, "--prompt", "a" * 430)
    assert code == 0
    assert "Note: the answer ends where the model can read no more." in err


def test_a_question_that_is_too_long_does_not_end_the_talk(
    cli: Cli, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 600 + "\nhi\n"))
    code, out, err = cli("chat", chat_model, "--max-new-tokens", 8)
    assert code == 0
    assert "can read at most 512" in err
    assert out == cli("chat", chat_model, "--max-new-tokens", 8, "--prompt", "hi")[1]


def test_an_interrupt_is_told_and_ends_with_130(
    cli: Cli, run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.train import watch

    def interrupt(self, step) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.Show, "_show", interrupt)
    code, _, err = cli("train", run_yaml)
    assert code == 130
    assert err.startswith("Stopped at step 1/2. Nothing was saved; training.save_every=…")
    monkeypatch.setattr("veneer.train.run_file.load", lambda *_: interrupt(None, None))
    assert cli("train", run_yaml)[::2] == (130, "Stopped.\n")


def test_an_error_of_the_system_is_one_line(cli: Cli, run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr("veneer.train.run_file.load", fail)
    assert cli("train", run_yaml) == (2, "", "Error: /somewhere: Permission denied\n")


def test_an_adapter_whose_model_moved_tells_what_to_do(
    cli: Cli, adapter: Path, chat_model: Path, tmp_path: Path
) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(chat_model), str(tmp_path / "moved")))
    for command in (["chat", adapter, "--prompt", "hi"], ["merge", adapter, "--into", tmp_path / "m"]):
        code, _, err = cli(*command)
        assert code == 2
        assert f"adapter_config.json names the model {tmp_path / 'moved'}, which is not here" in err
        assert f"veneer merge {adapter} --into FOLDER --base MODEL" in err
        assert f"veneer chat MODEL --adapter {adapter}" in err
    assert cli("merge", adapter, "--into", tmp_path / "m", "--base", chat_model)[0] == 0


def test_the_folder_of_a_run_is_not_its_adapter(cli: Cli, adapter: Path, run_yaml: Path, tmp_path: Path) -> None:
    for command in (
        ["chat", adapter.parent],
        ["inspect", adapter.parent],
        ["targets", adapter.parent],
        ["merge", adapter.parent, "--into", tmp_path / "m"],
        ["train", run_yaml, f"model={adapter.parent}", f"output={tmp_path / 'other'}"],
    ):
        code, _, err = cli(*command)
        assert code == 2
        assert err.rstrip().endswith(f"is the folder of a run: did you mean {adapter}?")
    code, _, err = cli("targets", adapter)
    assert code == 2
    assert "holds an adapter, not a model" in err


def test_a_single_target_may_be_a_pattern(cli: Cli, chat_model: Path) -> None:
    pattern = cli("targets", chat_model, "--target", r".*\.[qv]_proj")
    assert pattern == cli("targets", chat_model, "--target", "q_proj", "--target", "v_proj")
    assert pattern[0] == 0


def test_inspect_is_short_and_whole_in_a_narrow_terminal(
    cli: Cli, chat_model: Path, run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("train", run_yaml, "lora.modules_to_save=[lm_head]")[0] == 0
    out = cli("inspect", tmp_path / "out" / "adapter")[1]
    assert " KiB" in out
    assert "crc32" not in out
    assert "trained_with" not in out
    assert "base_model.model" not in out
    assert "lm_head.weight (whole)" in out
    monkeypatch.setenv("COLUMNS", "50")
    narrow = cli("inspect", tmp_path / "out" / "adapter")[1]
    cells = "".join(line.split("│")[1].strip() for line in narrow.splitlines() if line.startswith("│"))
    assert "lm_head.weight (whole)".replace(" ", "") in cells.replace(" ", "")


def test_a_wrong_option_is_an_error_of_its_own(cli: Cli) -> None:
    code, _, err = cli("targets")
    assert code == 2
    assert "Missing argument" in err

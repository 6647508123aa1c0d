"""A whole run on a tiny model: what it writes, what it refuses, how it goes on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.tiny_chat import model, write_rows
from train.tiny_run import WEIGHTS, Told, settings
from veneer import PeftModel
from veneer.errors import DataError, RunError, TargetError
from veneer.train.run import train


def test_a_run_writes_a_working_adapter_log_and_plot(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    told = Told()
    result = train(settings(chat_model, rows_file, tmp_path / "out"), progress=told)
    assert result.steps == 4
    assert result.losses[-1][1] < result.losses[0][1]
    assert told.steps == [1, 2, 3, 4]
    lines = [json.loads(line) for line in result.log_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"} <= lines[0].keys()
    assert result.plot is not None
    assert result.plot.is_file()
    files = {"adapter", "data.json", "log.jsonl", "loss.png", "run.yaml"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    adapted = PeftModel.from_pretrained(model(), str(result.adapter_dir))
    assert adapted.peft_config["default"].r == 4
    ids = torch.arange(3, 20).unsqueeze(0)
    with adapted.disable_adapter():
        plain = adapted(input_ids=ids).logits
    assert (adapted(input_ids=ids).logits - plain).abs().max() > 1e-3
    assert (result.adapter_dir / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("lora", "said"),
    [({}, False), ({"target_modules": ["lm_head"]}, True), ({"modules_to_save": ["lm_head"]}, True)],
    ids=["plain", "adapted", "trained"],
)
def test_a_run_says_where_the_loss_takes_all_the_logits(
    chat_model: Path, rows_file: Path, tmp_path: Path, lora: dict, said: bool
) -> None:
    told = Told()
    train(settings(chat_model, rows_file, tmp_path / "out", max_steps=1, lora=lora), progress=told)
    assert any("the loss is taken from the logits" in line for line in told.lines) == said


def test_the_settings_it_writes_do_the_same_again(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    from veneer.train.run_file import load

    first = train(settings(chat_model, rows_file, tmp_path / "out"))
    again = train(load(tmp_path / "out" / "run.yaml", [f"output={tmp_path / 'again'}"]))
    one, other = load_file(first.adapter_dir / WEIGHTS), load_file(again.adapter_dir / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_in_use_is_refused_unless_told(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(settings(chat_model, rows_file, out, max_steps=1))
    with pytest.raises(RunError, match="is not empty. Say overwrite=true"):
        train(settings(chat_model, rows_file, out, max_steps=1))
    train(settings(chat_model, rows_file, out, max_steps=2, overwrite=True))
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_a_run_that_goes_wrong_leaves_the_old_adapter(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = train(settings(chat_model, rows_file, out))
    before = (first.adapter_dir / WEIGHTS).read_bytes()
    with pytest.raises(RunError, match="not a finite number"):
        train(settings(chat_model, rows_file, out, overwrite=True, learning_rate=1e30, max_grad_norm=1e9, save_every=9))
    assert not (out / "checkpoints").exists()
    assert (first.adapter_dir / WEIGHTS).read_bytes() == before


def test_overwriting_deletes_nothing_before_everything_is_checked(
    chat_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(settings(chat_model, rows_file, out, save_every=2))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    empty = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": ""}])
    for error, wrong in (
        (DataError, settings(chat_model, empty, out, overwrite=True)),
        (DataError, settings(chat_model, rows_file, out, overwrite=True, max_length=8)),
        (RunError, settings(tmp_path / "nowhere", rows_file, out, overwrite=True)),
        (TargetError, settings(chat_model, rows_file, out, overwrite=True, lora={"target_modules": ["q_porj"]})),
    ):
        with pytest.raises(error):
            train(wrong)
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_rows_that_are_too_long_can_be_dropped(chat_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": "it " * (n + 1)} for n in range(12)]
    told = Told()
    file = write_rows(tmp_path / "rows.jsonl", rows)
    train(settings(chat_model, file, tmp_path / "out", data={"too_long": "drop"}, max_length=60), progress=told)
    assert told.lines[0].startswith("Note: 1 row dropped, as longer than training.max_length: line 12")
    assert told.lines[1].startswith("11 rows")


def test_rows_longer_than_the_model_can_read_are_refused(chat_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 600, "completion": "b"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"1 row longer than the 512 tokens the model can read at once: line 2\."):
        train(settings(chat_model, file, tmp_path / "out"))
    good = write_rows(tmp_path / "good.jsonl", rows[:1])
    with pytest.raises(DataError, match="longer than the 512 tokens the model can read at once: rows.jsonl line 2"):
        train(settings(chat_model, good, tmp_path / "out", data={"eval": str(file)}))
    train(settings(chat_model, file, tmp_path / "out", data={"too_long": "drop"}, max_length=512))


def test_one_step_trains_something(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    result = train(settings(chat_model, rows_file, tmp_path / "out", max_steps=1, warmup=0.03))
    (line,) = [json.loads(line) for line in result.log_file.read_text().splitlines()]
    assert line["learning_rate"] == 1e-2
    second = {name: value for name, value in load_file(result.adapter_dir / WEIGHTS).items() if "lora_B" in name}
    assert second
    assert all(value.abs().max() > 0 for value in second.values())


def test_training_that_changes_nothing_is_an_error(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = settings(
        chat_model, rows_file, tmp_path / "out", lora={"init_lora_weights": False}, learning_rate=1e-30, max_steps=1
    )
    with pytest.raises(RunError, match="Training changed nothing: all 28 trained tensors are as they were"):
        train(config)
    assert not (tmp_path / "out" / "adapter").exists()


def test_the_last_step_is_logged_and_evaluated(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = settings(
        chat_model, rows_file, tmp_path / "out", max_steps=5, log_every=3, data={"eval_fraction": 0.25}, eval_every=2
    )
    result = train(config)
    assert [step for step, _ in result.losses] == [1, 3, 5]
    assert [step for step, _ in result.eval_losses] == [2, 4, 5]


def test_an_output_that_cannot_be_made_is_named_before_anything_is_loaded(rows_file: Path, tmp_path: Path) -> None:
    for output, reason in (
        (rows_file / "out", "Not a directory"),
        (rows_file, "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(RunError, match=f"cannot be written to: {reason}"):
            train(settings(tmp_path / "no-model", rows_file, output))


def test_evaluation_rows_can_be_set_aside(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    told = Told()
    config = settings(chat_model, rows_file, tmp_path / "out", data={"eval_fraction": 0.25}, eval_every=2)
    result = train(config, progress=told)
    assert [step for step, _ in result.eval_losses] == [2, 4]
    assert told.lines[0].startswith("9 rows")


def test_the_output_head_can_be_a_target_or_saved_whole(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    for name, lora in {"a": {"target_modules": ["lm_head"]}, "b": {"modules_to_save": ["lm_head"]}}.items():
        result = train(settings(chat_model, rows_file, tmp_path / name, lora=lora))
        head = {key: value for key, value in load_file(result.adapter_dir / WEIGHTS).items() if "lm_head" in key}
        assert head
        assert result.losses[-1][1] < result.losses[0][1]


@pytest.mark.parametrize("changes", [{"packing": True, "max_length": 128}, {"gradient_checkpointing": True}])
def test_other_ways_to_train_learn_too(chat_model: Path, rows_file: Path, tmp_path: Path, changes: dict) -> None:
    result = train(settings(chat_model, rows_file, tmp_path / "out", batch_size=2, **changes))
    assert result.losses[-1][1] < result.losses[0][1]


def test_what_is_wrong_is_said_before_anything_is_written(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TargetError, match="did you mean q_proj"):
        train(settings(chat_model, rows_file, out, lora={"target_modules": ["q_porj"]}))
    with pytest.raises(DataError, match="line 1: 'completion' is empty"):
        train(settings(chat_model, write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": ""}]), out))
    with pytest.raises(DataError, match="longer than training.max_length=8"):
        train(settings(chat_model, rows_file, out, max_length=8))
    with pytest.raises(RunError, match="There is no model folder ./nowhere"):
        train(settings(Path("./nowhere"), rows_file, out).model_copy(update={"model": "./nowhere"}))
    with pytest.raises(RunError, match="leaves one part empty"):
        train(settings(chat_model, rows_file, out, data={"eval_fraction": 0.01}))
    assert not out.exists()

"""A whole run on a tiny model: what it writes, what it refuses, how it goes on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.tiny_chat import model, write_rows
from veneer import PeftModel
from veneer.errors import DataError, RunError, TargetError
from veneer.train.progress import Progress
from veneer.train.resume import newest_checkpoint
from veneer.train.run import train
from veneer.train.settings import RunConfig

WEIGHTS = "adapter_model.safetensors"


class Told(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, step) -> None:
        self.steps.append(step.step)


def settings(model_dir: Path, rows: Path, output: Path, *, lora: dict | None = None, **changes) -> RunConfig:
    training = {"epochs": None, "max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "warmup": 0}
    top = {key: changes.pop(key) for key in ("overwrite",) if key in changes}
    data = {"train": str(rows), **changes.pop("data", {})}
    return RunConfig.model_validate(
        {
            "model": str(model_dir),
            "data": data,
            "output": str(output),
            "lora": {"r": 4, **(lora or {})},
            "training": training | changes,
            **top,
        }
    )


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
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter", "log.jsonl", "loss.png", "run.yaml"}
    adapted = PeftModel.from_pretrained(model(), str(result.adapter_dir))
    assert adapted.peft_config["default"].r == 4
    ids = torch.arange(3, 20).unsqueeze(0)
    with adapted.disable_adapter():
        plain = adapted(input_ids=ids).logits
    assert (adapted(input_ids=ids).logits - plain).abs().max() > 1e-3
    assert (result.adapter_dir / "tokenizer_config.json").is_file()


def test_the_settings_it_writes_do_the_same_again(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    from veneer.train.run_file import load

    first = train(settings(chat_model, rows_file, tmp_path / "out"))
    again = train(load(tmp_path / "out" / "run.yaml", [f"output={tmp_path / 'again'}"]))
    one, other = load_file(first.adapter_dir / WEIGHTS), load_file(again.adapter_dir / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    whole = train(settings(chat_model, rows_file, tmp_path / "whole", save_every=2))
    train(settings(chat_model, rows_file, tmp_path / "half", save_every=2))
    half = tmp_path / "half"
    torn = half / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    torn.write_text(torn.read_text()[:100])  # as if the run had been killed while it wrote this
    told = Told()
    resumed = train(settings(chat_model, rows_file, half, save_every=2, resume=True), progress=told)
    assert any("checkpoint-2" in line for line in told.lines)
    assert told.steps == [3, 4]
    one, other = load_file(whole.adapter_dir / WEIGHTS), load_file(resumed.adapter_dir / WEIGHTS)
    assert all(torch.equal(one[name], other[name]) for name in one)
    checkpoint = {file.name for file in (half / "checkpoints" / "checkpoint-2").iterdir()}
    assert WEIGHTS in checkpoint
    assert "model.safetensors" not in checkpoint


def test_resume_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"found no checkpoint in .* Set training.save_every"):
        newest_checkpoint(tmp_path / "checkpoints")


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
        train(settings(chat_model, rows_file, out, overwrite=True, learning_rate=1e30, max_grad_norm=1e9))
    assert (first.adapter_dir / WEIGHTS).read_bytes() == before


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

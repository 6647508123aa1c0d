"""A run that was stopped goes on where it was, with what it was begun with, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.tiny_chat import write_rows
from train.tiny_run import WEIGHTS, Told, settings
from veneer.errors import RunError
from veneer.train.adapted import load_adapted
from veneer.train.resume import Start, Stopped, newest_checkpoint, note_attempt, started_again, trim_log
from veneer.train.run import train


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    whole = train(settings(chat_model, rows_file, tmp_path / "whole", save_every=2, warmup=3))
    train(settings(chat_model, rows_file, tmp_path / "half", save_every=2, warmup=3))
    half = tmp_path / "half"
    torn = half / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    torn.write_text(torn.read_text()[:100])  # as if the run had been killed while it wrote this
    told = Told()
    with (half / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    resumed = train(settings(chat_model, rows_file, half, save_every=2, warmup=3, resume=True), progress=told)
    assert logged(half) == [1, 2, 3, 4]
    assert any("checkpoint-2" in line for line in told.lines)
    assert told.steps == [3, 4]
    one, other = load_file(whole.adapter_dir / WEIGHTS), load_file(resumed.adapter_dir / WEIGHTS)
    assert all(torch.equal(one[name], other[name]) for name in one)
    checkpoint = {file.name for file in (half / "checkpoints" / "checkpoint-2").iterdir()}
    assert WEIGHTS in checkpoint
    assert "model.safetensors" not in checkpoint


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "orthogonal", "loftq"])
def test_what_a_start_took_off_the_base_is_still_off_it(
    chat_model: Path, rows_file: Path, tmp_path: Path, start: str
) -> None:
    lora = {"init_lora_weights": start}
    output = tmp_path / "out"
    whole = train(settings(chat_model, rows_file, output, save_every=2, lora=lora))
    expected = load_file(whole.adapter_dir / WEIGHTS)
    torn = output / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    torn.write_text(torn.read_text()[:100])
    resumed = train(settings(chat_model, rows_file, output, save_every=2, resume=True, lora=lora))
    found = load_file(resumed.adapter_dir / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "lora",
    [
        {"init_lora_weights": "pissa", "use_rslora": True},
        {"use_dora": True},
        {"trainable_token_indices": [1, 2]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_every_kind_of_adapter_is_resumed_bit_for_bit_and_loads(
    chat_model: Path, rows_file: Path, tmp_path: Path, lora: dict
) -> None:
    whole = train(settings(chat_model, rows_file, tmp_path / "whole", save_every=2, lora=lora))
    half = tmp_path / "half"
    train(settings(chat_model, rows_file, half, save_every=2, lora=lora))
    shutil.rmtree(half / "checkpoints" / "checkpoint-4")
    resumed = train(settings(chat_model, rows_file, half, save_every=2, lora=lora, resume=True))
    one, other = load_file(whole.adapter_dir / WEIGHTS), load_file(resumed.adapter_dir / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_adapted(str(whole.adapter_dir)).model.active_adapters == ["default"]


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[list[int]]]:
    """The tokens of each row that was trained on, without padding, by the step it was read for."""
    from veneer.train.trainer import VeneerSFTTrainer

    found: dict[int, list[list[int]]] = {}
    inner = VeneerSFTTrainer.training_step

    def spied(self, model, inputs, *args, **kwargs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        found.setdefault(self.state.global_step + 1, []).extend(ids[mask].tolist() for ids, mask in rows)
        return inner(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VeneerSFTTrainer, "training_step", spied)
    return found


@pytest.mark.parametrize("group_by_length", [True, False])
def test_a_run_that_goes_on_within_an_epoch_reads_the_rows_that_were_left(
    chat_model: Path, tmp_path: Path, rows_read: dict, group_by_length: bool
) -> None:
    rows = [{"prompt": "why " * (1 + 7 * n % 22), "completion": f"as {n}"} for n in range(22)]
    file = write_rows(tmp_path / "uneven.jsonl", rows)
    changes: dict = {"save_every": 2, "keep_checkpoints": 4, "max_steps": 8, "gradient_accumulation": 2}
    changes["group_by_length"] = group_by_length
    lora = {"lora_dropout": 0.1}
    whole = train(settings(chat_model, file, tmp_path / "whole", lora=lora, **changes))
    expected = dict(rows_read)
    epoch = [row for step in (4, 5, 6) for row in expected[step]]
    assert len(epoch) == len({tuple(row) for row in epoch}) == 22
    for changed in ({}, {"batch_size": 2, "gradient_accumulation": 4}):
        half = tmp_path / f"half{len(changed)}"
        shutil.copytree(tmp_path / "whole", half)
        for step in (6, 8):
            shutil.rmtree(half / "checkpoints" / f"checkpoint-{step}")
        rows_read.clear()
        resumed = train(settings(chat_model, file, half, lora=lora, resume=True, **changes | changed))
        assert rows_read == {step: expected[step] for step in (5, 6, 7, 8)}
        one, other = load_file(whole.adapter_dir / WEIGHTS), load_file(resumed.adapter_dir / WEIGHTS)
        assert changed or all(torch.equal(one[name], other[name]) for name in one)


def test_resume_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"found no checkpoint in .* Set training.save_every"):
        newest_checkpoint(tmp_path / "checkpoints")


@pytest.fixture
def half(chat_model: Path, rows_file: Path, tmp_path: Path) -> Path:
    """A finished run with a checkpoint after steps 2 and 4."""
    train(settings(chat_model, rows_file, tmp_path / "half", save_every=2))
    return tmp_path / "half"


def test_other_settings_are_refused_and_listed(chat_model: Path, rows_file: Path, half: Path) -> None:
    told = Told()
    before = (half / "run.yaml").read_bytes()
    changed = settings(
        chat_model, rows_file, half, resume=True, save_every=2, learning_rate=1e-3, packing=True, lora={"r": 8}
    )
    with pytest.raises(RunError) as caught:
        train(changed, progress=told)
    for line in (
        "training.learning_rate was 0.01, is now 0.001",
        "training.packing was false, is now true",
        "lora.r was 4, is now 8",
    ):
        assert line in str(caught.value)
    assert told.lines == []
    assert (half / "run.yaml").read_bytes() == before


def test_a_run_from_before_rows_were_grouped_goes_on_ungrouped(chat_model: Path, rows_file: Path, half: Path) -> None:
    record = half / "run.yaml"
    text = record.read_text()
    record.write_text(text.replace("  group_by_length: true\n", ""))
    assert record.read_text() != text
    with pytest.raises(RunError, match="group_by_length was false, is now true"):
        train(settings(chat_model, rows_file, half, save_every=2, resume=True))


def test_other_data_is_refused(chat_model: Path, rows_file: Path, half: Path, tmp_path: Path) -> None:
    lines = rows_file.read_text().splitlines(keepends=True)
    rows_file.write_text("".join(reversed(lines)))
    with pytest.raises(RunError, match="data.train holds other rows than before"):
        train(settings(chat_model, rows_file, half, resume=True, save_every=2))
    rows_file.write_text("".join(lines[1:]))
    with pytest.raises(RunError, match="data.train held 12 rows, holds 11 now"):
        train(settings(chat_model, rows_file, half, resume=True, save_every=2))
    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(lines))
    with pytest.raises(RunError, match="data.eval was null, is now set"):
        train(settings(chat_model, moved, half, resume=True, save_every=2, data={"eval": str(moved)}))
    train(settings(chat_model, moved, half, resume=True, save_every=2, max_steps=5))


def test_length_and_saving_may_change_and_count(chat_model: Path, rows_file: Path, half: Path) -> None:
    changed = settings(chat_model, rows_file, half, resume=True, save_every=3, max_steps=7, log_every=2)
    assert train(changed).steps == 7
    assert logged(half) == [1, 2, 3, 4, 6, 7]
    assert (half / "checkpoints" / "checkpoint-6").is_dir()
    assert newest_checkpoint(half / "checkpoints").name == "checkpoint-7"


def test_a_finished_run_can_go_on_to_nothing_more(chat_model: Path, rows_file: Path, half: Path) -> None:
    before = load_file(half / "adapter" / WEIGHTS)
    assert train(settings(chat_model, rows_file, half, resume=True, save_every=2)).steps == 4
    after = load_file(half / "adapter" / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RunError, match="checkpoint-4 is past training.max_steps=3"):
        train(settings(chat_model, rows_file, half, resume=True, save_every=2, max_steps=3))


@pytest.mark.parametrize("name", ["run.yaml", "data.json"])
def test_without_a_record_nothing_goes_on(chat_model: Path, rows_file: Path, half: Path, name: str) -> None:
    (half / name).unlink()
    with pytest.raises(RunError, match=f"needs .*{name}, which says what the checkpoints were made with"):
        train(settings(chat_model, rows_file, half, resume=True, save_every=2))
    if name == "data.json":
        (half / name).write_text('{"data.train": 3}')
        with pytest.raises(RunError, match="data.json is damaged"):
            train(settings(chat_model, rows_file, half, resume=True, save_every=2))


class Interrupting(Told):
    """Presses Ctrl-C after the third step."""

    def step(self, step) -> None:
        super().step(step)
        if step.step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_run_says_what_is_kept(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped) as stop:
        train(settings(chat_model, rows_file, out, save_every=2), progress=Interrupting())
    assert str(stop.value) == (
        f"Stopped at step 3/4. Kept: checkpoint-2. Go on with: veneer train {out / 'run.yaml'} training.resume=true"
    )
    with pytest.raises(Stopped, match=r"Stopped at step 3/4\. Nothing was saved; training.save_every=… keeps"):
        train(settings(chat_model, rows_file, out, overwrite=True), progress=Interrupting())
    assert not (out / "checkpoints").exists()


def test_a_loss_that_is_no_number_names_the_adapter_that_is_kept(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.train.trainer import VeneerSFTTrainer

    compute = VeneerSFTTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(VeneerSFTTrainer, "compute_loss", broken)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(RunError, match=r"at step 4.*\n.*\n  The adapter of step 2 is kept: .*checkpoint-2$"):
        train(settings(chat_model, rows, tmp_path / "out", save_every=2))


def test_a_log_is_cut_back_to_a_step(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    trim_log(file, 3)
    assert not file.exists()
    file.write_text('{"step": 1}\n{"step": 3}\n{"step": 3, "eval_loss": 1}\n{"step": 4}\n{"st')
    trim_log(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 3, "eval_loss": 1}\n'


def test_a_restart_goes_on_with_its_own_attempt_alone(
    chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = settings(chat_model, rows_file, out)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run1")
    as_asked = Start(resume=False, overwrite=False)
    assert started_again(config) == as_asked
    out.mkdir()
    note_attempt(out)
    assert started_again(config) == as_asked  # the first attempt
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert started_again(config).overwrite  # nothing to go on from
    whole = out / "checkpoints" / "checkpoint-2"
    whole.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"):
        (whole / name).write_text("{}")
    (whole / "processes.json").write_text('{"processes": 2}')
    assert started_again(config).overwrite  # the second process had not written its part
    (whole / "rng_state_1.pth").touch()
    assert started_again(config) == Start(resume=True, overwrite=False)
    assert started_again(config).applied_to(config).training.resume
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run2")
    assert started_again(config) == as_asked

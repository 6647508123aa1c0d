"""Memory that runs out: what is said, what is kept, and that the advice works."""

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.tiny_run import WEIGHTS, settings
from veneer.errors import RunError
from veneer.train import trainer
from veneer.train.out_of_memory import Batch, Doing, Room, explained, is_out_of_memory, ways_out
from veneer.train.resume import newest_checkpoint
from veneer.train.run import train
from veneer.train.run_file import load

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.57 GiB of which 1.02 GiB is "
    "free. Including non-PyTorch memory, this process has 22.5 GiB memory in use."
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1099511627776 bytes. Error code 12 (Cannot allocate memory)"
)
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB). Tried to allocate 1 GB.")


def test_each_allocators_words_are_known():
    for error in (CUDA, torch.cuda.OutOfMemoryError("x"), CPU, MPS, MemoryError()):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    assert is_out_of_memory(real.value)


class Failing:
    """Raises an error in one phase of the step after `step`, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, phase: str, error: BaseException, *, step: int = 2) -> None:
        self.left = 1
        owner, name = {
            "the forward pass": (trainer, "summed_loss"),
            "the evaluation": (trainer, "summed_loss"),
            "the backward pass": (torch.Tensor, "backward"),
            "the optimizer's step": (torch.optim.AdamW, "step"),
        }[phase]
        real = getattr(owner, name)
        seen = []

        def broken(*args, **kwargs):
            seen.append(1)
            if len(seen) > step and self.left:
                self.left = 0
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize(
    ("phase", "error", "said"),
    [
        ("the forward pass", MPS, "MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)."),
        ("the backward pass", CUDA, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (
            "the optimizer's step",
            CPU,
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776",
        ),
    ],
)
def test_a_run_says_what_it_was_at_and_what_to_change(
    chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, error, said: str
) -> None:
    Failing(monkeypatch, phase, error)
    out = tmp_path / "out"
    with pytest.raises(RunError) as raised:
        train(settings(chat_model, rows_file, out, save_every=1))
    text = str(raised.value)
    assert text.startswith(f"Memory ran out at step 3 of 4, in {phase} on 4 rows of ")
    assert said in text
    assert "The largest batch that went through was 4 rows of " in text
    assert "training.batch_size=2 training.gradient_accumulation=2   half of what the batch takes" in text
    assert "training.gradient_checkpointing=true" in text
    checkpoint = newest_checkpoint(out / "checkpoints")
    assert checkpoint.name == "checkpoint-2"
    again = "training.resume=true training.batch_size=2 training.gradient_accumulation=2"
    assert text.splitlines()[-1] == f"  Kept: {checkpoint}. Go on with: veneer train {out / 'run.yaml'} {again}"
    assert not (out / "adapter").exists()


def test_the_command_it_names_goes_on_with_the_same_steps(
    chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings(chat_model, rows_file, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        Failing(patched, "the backward pass", CUDA)
        with pytest.raises(RunError) as raised:
            train(settings(chat_model, rows_file, tmp_path / "out", save_every=1))
    command = shlex.split(str(raised.value).partition("Go on with: ")[2])
    assert command[:2] == ["veneer", "train"]
    result = train(load(Path(command[2]), [*command[3:], "training.gradient_checkpointing=true"]))
    assert result.steps == 4
    expected, found = load_file(whole.adapter_dir / WEIGHTS), load_file(result.adapter_dir / WEIGHTS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3)


def test_another_number_of_rows_a_step_is_another_run(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    train(settings(chat_model, rows_file, tmp_path / "out", max_steps=1, save_every=1))
    with pytest.raises(RunError, match=r"training.batch_size was 4, is now 2"):
        train(settings(chat_model, rows_file, tmp_path / "out", batch_size=2, resume=True))


def test_without_a_checkpoint_it_begins_anew(
    chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        Failing(patched, "the forward pass", CUDA, step=0)
        with pytest.raises(RunError) as raised:
            train(settings(chat_model, rows_file, out))
    text = str(raised.value)
    assert "The largest batch that went through" not in text
    assert "Nothing was saved (training.save_every=… does). Begin anew with: veneer train" in text
    command = shlex.split(text.partition("Begin anew with: ")[2])
    assert train(load(Path(command[2]), command[3:])).steps == 4


def test_an_evaluation(chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, "the evaluation", CUDA, step=1)
    with pytest.raises(RunError, match=r"in the evaluation on \d rows? of") as raised:
        train(settings(chat_model, rows_file, tmp_path / "out", eval_every=1, data={"eval_fraction": 0.3}))
    assert "gradient_checkpointing" not in str(raised.value)


def test_other_errors_stay_what_they_are(
    chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, "the backward pass", RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        train(settings(chat_model, rows_file, tmp_path / "out"))


def test_a_model_that_does_not_fit(
    chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args, **kwargs):
        raise CUDA

    monkeypatch.setattr("veneer.train.run.build_trainer", no_room)
    with pytest.raises(
        RunError, match=r"not enough memory for the model .*\n.*Tried to allocate 2.00 GiB\.\n.*bfloat16"
    ):
        train(settings(chat_model, rows_file, tmp_path / "out"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_room)
    with pytest.raises(RunError, match="not enough memory for the model"):
        train(settings(chat_model, rows_file, tmp_path / "out"))


class TestWays:
    def ways(self, doing: Doing, **changes) -> list[str]:
        run = settings(Path("model"), Path("rows"), Path("out"), **changes)
        return [" ".join(way.settings) for way in ways_out(run, doing, torch.float32)]

    def test_a_single_row(self):
        doing = Doing(batch=Batch(1, 1000))
        assert self.ways(doing, batch_size=1) == [
            "training.gradient_checkpointing=true",
            "dtype=bfloat16",
            "training.max_length=500 data.too_long=drop",
        ]

    def test_packs(self):
        found = self.ways(Doing(batch=Batch(1, 1024)), batch_size=1, packing=True, gradient_checkpointing=True)
        assert found == ["dtype=bfloat16", "training.max_length=512"]

    def test_an_odd_number_of_rows_stays_the_same_in_each_step(self):
        found = self.ways(Doing(batch=Batch(9, 32)), batch_size=9, gradient_accumulation=2)
        assert found[0] == "training.batch_size=3 training.gradient_accumulation=6"
        assert not any("max_length" in way for way in found)

    def test_nothing_is_left(self):
        run = settings(Path("model"), Path("rows"), Path("out"), batch_size=1, gradient_checkpointing=True)
        room = Room("cuda:0", 24 * 2**30, 15 * 2**30)
        text = str(
            explained(
                CUDA, run, Doing(batch=Batch(1, 8)), step=1, steps=9, dtype=torch.bfloat16, trained=10**6, room=room
            )
        )
        assert "on 1 row of 8 tokens." in text
        assert "cuda:0 has 24.0 GiB in all; the model takes 15.0 GiB, training it 11.4 MiB more" in text
        assert "No setting is left that would need less" in text
        assert "A smaller lora.r would hardly help" in text

"""LoRA+ and LoRA-FA from a run file: they learn, they resume exactly, and what has no effect is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.tiny_run import WEIGHTS, Told, settings
from veneer.errors import ConfigError, RunError
from veneer.train.resume import newest_checkpoint
from veneer.train.run import train

EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}


def checkpointed_groups(folder: Path) -> list[dict[str, Any]]:
    file = newest_checkpoint(folder / "checkpoints") / "optimizer.pt"
    return torch.load(file, weights_only=True)["param_groups"]


@pytest.mark.parametrize("optimizer", ["loraplus", "lorafa"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}])
def test_it_learns_and_a_resumed_run_ends_where_an_uninterrupted_one_does(
    chat_model: Path, rows_file: Path, tmp_path: Path, optimizer: str, lora: dict
) -> None:
    said = {
        "optimizer": optimizer,
        "save_every": 2,
        "warmup": 3,
        "weight_decay": 0.1,
        "lora": lora,
        "group_by_length": False,
    }
    whole = train(settings(chat_model, rows_file, tmp_path / "whole", **said))
    assert [step for step, _ in whole.losses] == [1, 2, 3, 4]
    assert whole.losses[-1][1] < whole.losses[0][1]
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-4")
    resumed = train(settings(chat_model, rows_file, half, resume=True, **said))
    assert resumed.losses == whole.losses
    one, other = load_file(whole.adapter_dir / WEIGHTS), load_file(resumed.adapter_dir / WEIGHTS)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lorafa_trains_half_of_the_numbers_and_says_so(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    told = Told()
    made = train(settings(chat_model, rows_file, tmp_path / "out", optimizer="lorafa", save_every=2), progress=told)
    at_2 = load_file(tmp_path / "out" / "checkpoints" / "checkpoint-2" / WEIGHTS)
    at_4 = load_file(made.adapter_dir / WEIGHTS)
    assert {name for name in at_2 if torch.equal(at_2[name], at_4[name])} == {name for name in at_2 if "_A." in name}
    assert made.trainable == sum(value.numel() for name, value in at_4.items() if "_B." in name)
    assert any(f"{made.trainable:,} of {made.total:,} parameters are trained" in line for line in told.lines)


@pytest.mark.parametrize(("said", "expected"), [({}, 16), ({"loraplus_lr_ratio": 4}, 4)])
def test_loraplus_trains_B_faster(
    chat_model: Path, rows_file: Path, tmp_path: Path, said: dict, expected: float
) -> None:
    made = settings(
        chat_model, rows_file, tmp_path / "out", optimizer="loraplus", save_every=2, weight_decay=0.1, **said
    )
    train(made)
    groups = checkpointed_groups(tmp_path / "out")
    assert [group["initial_lr"] for group in groups] == [0.01, 1e-6, 0.01 * expected, 0.01 * expected]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.0]
    first = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert first["learning_rate"] == 0.01


def test_the_learning_rate_of_an_embedding(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    said = {"optimizer": "loraplus", "loraplus_lr_embedding": 0.002, "save_every": 4}
    train(settings(chat_model, rows_file, tmp_path / "out", lora=EMBEDDING, **said))
    group = checkpointed_groups(tmp_path / "out")[1]
    assert (group["initial_lr"], len(group["params"])) == (0.002, 2)
    with pytest.raises(RunError, match="loraplus_lr_embedding has no effect: no adapter lies on an embedding"):
        train(settings(chat_model, rows_file, tmp_path / "other", **said))
    assert not (tmp_path / "other").exists()


def test_what_lorafa_cannot_train_is_an_error_before_anything_is_lost(
    chat_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(settings(chat_model, rows_file, out, save_every=2))
    before = sorted(out.rglob("*"))
    with pytest.raises(ConfigError, match="embed_tokens.adapters.default\n"):
        train(settings(chat_model, rows_file, out, overwrite=True, lora=EMBEDDING, optimizer="lorafa"))
    assert sorted(out.rglob("*")) == before


def test_another_optimizer_is_another_run(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(settings(chat_model, rows_file, out, save_every=2))
    changed = settings(chat_model, rows_file, out, resume=True, save_every=2, optimizer="loraplus", loraplus_lr_ratio=8)
    with pytest.raises(RunError) as caught:
        train(changed)
    assert "training.optimizer was adamw, is now loraplus" in str(caught.value)
    assert "training.loraplus_lr_ratio was null, is now 8" in str(caught.value)

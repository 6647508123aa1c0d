"""Runs on several processes, started by torchrun: what they train is what one process trains."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
# What is worth a second run on four ranks: uneven shards, empty ones, and copies of shards.
ON_FOUR = ("ddp", "dora", "copies of shards", "saved modules", "tied saved", "lorafa")


def torchrun(ranks: int, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return alone(*command[1:], str(HERE / program), *words)


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    told = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=500, env=told)


def finished(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_two_ranks_train_what_one_process_does():
    from distributed.parity import CASES

    found = finished(torchrun(2, "parity.py")).splitlines()
    assert [line.rpartition(":")[0] for line in found if line.rpartition(":")[0] in CASES] == list(CASES)


@pytest.mark.slow
def test_four_ranks_train_what_one_process_does():
    found = finished(torchrun(4, "parity.py", *ON_FOUR))
    assert all(f"{name}: " in found for name in ON_FOUR)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_base_is_loaded_shard_by_shard(ranks):
    found = finished(torchrun(ranks, "from_meta.py"))
    assert "refusals are clear" in found


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_is_told_on_all(tmp_path):
    found = finished(torchrun(2, "agreeing.py", str(tmp_path)))
    assert "refused: on the first rank only" in found


@pytest.mark.slow
def test_a_rank_with_a_bad_input_ends_the_run(tmp_path):
    begun = time.monotonic()
    done = torchrun(2, "agreeing.py", str(tmp_path), "nan")
    assert done.returncode != 0
    assert time.monotonic() - begun < 400, "torch gives up a collective after ten minutes or more"
    said = [line for line in done.stderr.splitlines() if "veneer.errors." in line]
    assert len([line for line in said if "DataError: The loss of step 1 is not finite." in line]) == 1, done.stderr
    assert len([line for line in said if "RankError: Stopped while step 1" in line]) == 1, done.stderr


@pytest.mark.slow
def test_the_loss_of_training_under_ddp_is_that_of_one_process():
    assert finished(torchrun(2, "training_loss.py")).splitlines()[-2:] == ["equal in the head", "equal from the logits"]


@pytest.mark.slow
def test_the_older_fsdp_wraps_what_trains_apart():
    assert finished(torchrun(2, "fsdp1.py")).splitlines()[-3:] == ["equal: plain", "equal: dora", "equal: copies"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lorafa"])
def test_a_run_whose_rank_was_killed_goes_on_with_another_number(tmp_path, optimizer):
    program = str(HERE / "resumed.py")
    finished(alone(program, str(tmp_path / "whole"), "alone", optimizer))
    killed = torchrun(2, "resumed.py", str(tmp_path / "parts"), "fsdp2", optimizer, "kill", "5")
    assert killed.returncode != 0
    assert "-9" in killed.stderr
    checkpoints = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert checkpoints == ["step-002", "step-004"]
    assert "rank 3 of 4 begins after step 4" in finished(
        torchrun(4, "resumed.py", str(tmp_path / "parts"), "fsdp2", optimizer)
    )
    assert distance(tmp_path / "whole", tmp_path / "parts") < 1e-5
    if optimizer == "adamw":  # what four ranks wrote goes on in one process, which knows of no ranks
        (tmp_path / "parts" / "step-008").rename(tmp_path / "last")
        said = finished(alone(program, str(tmp_path / "parts"), "alone", optimizer))
        assert "rank 0 of 1 begins after step 6" in said
        assert distance(tmp_path / "whole", tmp_path / "parts") < 1e-5


def distance(one: Path, other: Path) -> float:
    """The relative L2 distance of the adapters of two runs."""
    expected, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    apart = sum((found[key].double() - expected[key].double()).square().sum() for key in expected)
    return float((apart / sum(value.double().square().sum() for value in expected.values())) ** 0.5)

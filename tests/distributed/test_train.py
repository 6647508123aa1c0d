"""`veneer train` on two processes: by torchrun, and by --launch ddp. It must be the run of one process."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.tiny_chat import write_rows
from train.tiny_run import WEIGHTS, settings

TESTS = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


def python(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    settings = {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | settings, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )


def distance(one: Path, other: Path) -> float:
    """Relative L2 distance of two adapters."""
    left, right = load_file(one / "adapter" / WEIGHTS), load_file(other / "adapter" / WEIGHTS)
    assert left.keys() == right.keys()
    apart = sum((left[name] - right[name]).double().square().sum() for name in left)
    return float((apart / sum(value.double().square().sum() for value in left.values())) ** 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, fifteen rows of several lengths, and the runs of one process with the same rows a step."""
    from train.tiny_chat import save_to
    from veneer.train.run import train

    folder = tmp_path_factory.mktemp("runs")
    model = save_to(folder / "model")
    rows = [{"prompt": f"say {n}", "completion": f"it is {n} " * (1 + n % 3)} for n in range(15)]
    file = write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "rows-0.jsonl", rows)
    write_rows(folder / "rows-1.jsonl", [*rows, {"prompt": "a", "completion": ""}])
    write_rows(folder / "good-0.jsonl", rows)
    write_rows(folder / "good-1.jsonl", rows[1:])
    common = {"batch_size": 4, "epochs": 2, "max_steps": None, "data": {"eval_fraction": 0.3}}
    result = train(settings(model, file, folder / "grouped-1", eval_every=2, **common))
    train(settings(model, file, folder / "shuffled-1", group_by_length=False, lora={"use_dora": True}, **common))
    longer = {**common, "max_steps": 6, "epochs": None, "schedule": "constant"}
    train(settings(model, file, folder / "whole", **longer))
    train(settings(model, file, folder / "pissa-1", lora={"init_lora_weights": "pissa"}, **common))
    train(settings(model, file, folder / "nf4-1", **common).model_copy(update={"quantization": "nf4"}))
    (folder / "one.json").write_text(json.dumps({"eval": result.eval_losses, "tokens": result.tokens}))
    return folder


def test_two_processes_by_torchrun_are_one(folder: Path) -> None:
    done = python(*TORCHRUN, TESTS / "distributed" / "train_runs.py", folder)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for kind in ("grouped", "shuffled"):
        assert distance(folder / f"{kind}-1", folder / f"{kind}-2") < 1e-5, kind
    assert distance(folder / "whole", folder / "resumed") < 1e-5

    one = json.loads((folder / "one.json").read_text())
    assert torch.tensor(first["eval"]).allclose(torch.tensor(one["eval"]), rtol=1e-6)
    assert first["tokens"] == one["tokens"]
    lines = map(json.loads, (folder / "grouped-2" / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 7)]
    assert (first["steps"], second["steps"]) == ([*range(1, 7)], [])
    assert second["said"] == 0 < first["said"]
    assert "| processes | 2 |" in (folder / "grouped-2" / "adapter" / "README.md").read_text(encoding="utf-8")
    checkpoint = folder / "grouped-2" / "checkpoints" / "checkpoint-6"
    assert {"rng_state_0.pth", "rng_state_1.pth", "processes.json"} <= {file.name for file in checkpoint.iterdir()}

    assert (first["alone"][0], second["alone"][0]) == ("elsewhere", "DataError")
    assert second["alone"][1].startswith("In process 1 of 2, on ")
    assert "'completion' is empty" in second["alone"][1]
    assert first["everywhere"][0] == "DataError"
    assert first["everywhere"][1].startswith("There is no data file ")
    assert "is not empty. Say overwrite=true" in first["in use"][1]
    assert "a step took 4 rows in 2 processes, would take 8 in 2" not in first["other rows a step"][1]
    assert "training.batch_size was 2, is now 4" in first["other rows a step"][1]
    assert first["other data"][0] == second["other data"][0] == "RunError"
    assert "The data files differ between process 0 and process 1" in first["other data"][1]
    assert {one["bad exists"] for one in (first, second)} == {False}
    assert {second[name][0] for name in ("everywhere", "in use", "other rows a step")} <= {"elsewhere"}


def run_file(folder: Path, name: str, rows: str = "rows.jsonl") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(
        f"model: {folder / 'model'}\ndata: {{train: {folder / rows}, eval_fraction: 0.3}}\noutput: {folder / name}\n"
        "lora: {r: 4}\ntraining: {epochs: 2, batch_size: 2, learning_rate: 1e-2, warmup: 0, save_every: 2}\n"
    )
    return file


def lines_of(text: str) -> list[str]:
    """Without what torchrun and other libraries log."""
    noise = ("Failed to load", "W1", "E1", "[rank", "[Gloo]", "[W", "[E")
    return [line for line in text.splitlines() if line.strip() and not line.startswith(noise)]


def test_launch_starts_the_processes_and_one_speaks(folder: Path) -> None:
    done = python("-m", "veneer.cli", "train", run_file(folder, "launched"), "--launch", "ddp", "--processes", "2")
    assert done.returncode == 0, done.stderr[-6000:]
    assert distance(folder / "grouped-1", folder / "launched") < 1e-5
    assert done.stdout.count("Trained 6 steps") == 1
    assert done.stdout.count("Adapter: ") == 1


def test_launch_ends_with_one_error(folder: Path) -> None:
    file = run_file(folder, "launched-bad", "rows-1.jsonl")
    done = python("-m", "veneer.cli", "train", file, "--launch", "ddp", "--processes", "2")
    assert done.returncode == 2
    said = lines_of(done.stderr)
    assert said[0].startswith("DataError: ")
    assert "'completion' is empty" in said[1]
    assert len(said) == 2
    assert not (folder / "launched-bad").exists()


@pytest.mark.parametrize(("how", "said"), [("memory", "RunError: Memory ran out at step 4 of 6"), ("kill", "SIGKILL")])
def test_a_process_that_fails_ends_all_with_one_error_and_the_run_can_go_on(folder: Path, how: str, said: str) -> None:
    file = run_file(folder, f"fails-{how}")
    done = python(*TORCHRUN, TESTS / "distributed" / "train_fails.py", how, file)
    assert done.returncode != 0
    assert done.stderr.count("RunError: ") <= 1, done.stderr  # torchrun may be faster to tell of one that was killed
    assert said in done.stderr
    ours = done.stderr.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
    assert ours.count("Traceback") <= 1  # torchrun's own
    assert not (folder / f"fails-{how}" / "adapter").exists()
    # one process goes on with what two began
    again = python("-m", "veneer.cli", "train", file, "training.resume=true", "training.batch_size=4")
    assert again.returncode == 0, again.stderr
    assert distance(folder / "grouped-1", folder / f"fails-{how}") < 1e-5


def test_processes_that_torchrun_starts_again_go_on(folder: Path) -> None:
    file = run_file(folder, "restarted")
    done = python(*TORCHRUN, "--max-restarts", "1", TESTS / "distributed" / "train_fails.py", "memory", file)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Going on from" in done.stdout
    assert distance(folder / "grouped-1", folder / "restarted") < 1e-5


def test_two_processes_under_accelerates_fsdp2_are_one(folder: Path) -> None:
    done = python(*TORCHRUN, TESTS / "distributed" / "train_sharded.py", folder)
    assert done.returncode == 0, done.stderr[-6000:]
    pairs = {"whole": "resumed", "shuffled-1": "dora", "pissa-1": "pissa", "nf4-1": "nf4"}
    for one, name in pairs.items():
        assert distance(folder / one, folder / f"fsdp-{name}") < 1e-5, name
    files = {file.name for file in (folder / "fsdp-resumed" / "checkpoints" / "checkpoint-6").iterdir()}
    assert "optimizer.bin" in files
    assert not any(name.startswith(("pytorch_model", "model")) for name in files)  # no copy of the base


def test_two_machines_are_one(folder: Path) -> None:
    """Two agents of torchrun, one process each, as docs/scale.md starts them on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run1"]
    file = run_file(folder, "machines")
    words = [*TORCHRUN[:2], *several, "--rdzv-endpoint", f"localhost:{port}", "-m", "veneer.cli", "train", file]
    with ThreadPoolExecutor(2) as machines:
        done = [one.result() for one in [machines.submit(python, *words) for _ in range(2)]]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    assert sum(one.stdout.count("Trained 6 steps") for one in done) == 1
    assert distance(folder / "grouped-1", folder / "machines") < 1e-5

"""`veneer train` under DeepSpeed on two processes of a CPU: it must be the run of one process."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from distributed.test_train import TORCHRUN, distance, python, run_file
from distributed.zero_cases import CASES, COMMON, HALVES, NEAR, WHOLE
from train.tiny_chat import write_rows
from train.tiny_run import settings

HERE = Path(__file__).parent
INSTALLED = find_spec("deepspeed") is not None
ZERO_3 = ("deepspeed-zero3", "--processes", "2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed: pip install 'veneer[deepspeed]'"),
]
OWN_PROFILE = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {json}, zero3_init_flag: true, deepspeed_multinode_launcher: standard}}
num_machines: 1
machine_rank: 0
rdzv_backend: static
same_network: true
use_cpu: false
debug: false
"""
OWN_CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "overlap_comm": False,
        "contiguous_gradients": True,
    },
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, fifteen rows of several lengths, profiles, and the runs of one process with the same rows a step."""
    from train.tiny_chat import save_to
    from veneer.train.run import train

    folder = tmp_path_factory.mktemp("zero")
    model = save_to(folder / "model")
    rows = [{"prompt": f"say {n}", "completion": f"it is {n} " * (1 + n % 3)} for n in range(15)]
    file = write_rows(folder / "rows.jsonl", rows)
    (folder / "own.json").write_text(json.dumps(OWN_CONFIG))
    (folder / "own.yaml").write_text(OWN_PROFILE.format(json=folder / "own.json"))
    common = {**COMMON, "batch_size": 4}
    for name, case in CASES.items():
        changes = dict(case["settings"])
        top = {key: changes.pop(key) for key in ("dtype", "quantization") if key in changes}
        train(settings(model, file, folder / f"one-{name}", **{**common, **changes}).model_copy(update=top))
    train(settings(model, file, folder / "whole", **{**common, **WHOLE}))
    for name in ("one-begun", "one-begun-too"):
        train(settings(model, file, folder / name, **{**common, **HALVES[0]}))
    return folder


def test_two_processes_under_deepspeed_are_one(folder: Path) -> None:
    from veneer.train.run import train

    done = python(*TORCHRUN, HERE / "zero_runs.py", folder)
    assert done.returncode == 0, done.stderr[-6000:] + done.stdout[-2000:]
    for name, case in CASES.items():
        for stage in case["stages"]:
            apart = distance(folder / f"one-{name}", folder / f"zero{stage}-{name}")
            assert apart < NEAR.get(name, 1e-5), (name, stage, apart)
    checkpoint = folder / "zero3-begun" / "checkpoints" / "checkpoint-2"
    assert {file.name for file in checkpoint.iterdir() if file.suffix in (".pt", ".bin", ".safetensors")} == {
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "training_args.bin",
    }
    # what two began with ZeRO 3 one goes on with, without DeepSpeed
    again = {**COMMON, **HALVES[1], "batch_size": 4}
    train(settings(folder / "model", folder / "rows.jsonl", folder / "zero3-begun", **again))
    for name in ("zero2-begun", "zero3-begun", "one-begun", "one-begun-too"):
        assert distance(folder / "whole", folder / name) < 1e-5, name


def test_launch_starts_deepspeed_and_one_speaks(folder: Path) -> None:
    file = run_file(folder, "launched")
    done = python("-m", "veneer.cli", "train", file, "training.epochs=1", "--launch", *ZERO_3)
    assert done.returncode == 0, done.stderr[-6000:]
    assert distance(folder / "one-plain", folder / "launched") < 1e-5
    assert done.stdout.count("Trained 3 steps") == 1
    assert done.stdout.count("Adapter: ") == 1
    assert "DeepSpeed" not in done.stdout + done.stderr

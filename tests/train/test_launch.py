"""What --launch hands to accelerate, and what it refuses before a process is started."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from veneer.errors import MissingPackageError, RunError
from veneer.train import launch, zero


def handed_over(profile: str, monkeypatch: pytest.MonkeyPatch) -> tuple[SimpleNamespace, dict[str, str]]:
    """accelerate's own reading of a profile: the arguments, and the environment that each process gets."""
    words = ["--config_file", str(launch.profile_file(profile)), "--num_processes", "8", "--main_process_port", "0"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "program.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args)


def test_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    args, env = handed_over("ddp", monkeypatch)
    assert args.multi_gpu
    assert not args.use_fsdp
    assert not args.use_deepspeed
    assert args.nproc_per_node == "8"
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"


def test_fsdp2_shards_layers_and_what_accelerate_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    args, env = handed_over("fsdp2", monkeypatch)
    assert args.use_fsdp
    said = {name: env[f"FSDP_{name}"] for name in ("VERSION", "AUTO_WRAP_POLICY", "RESHARD_AFTER_FORWARD")}
    assert said == {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "RESHARD_AFTER_FORWARD": "true"}
    assert env["ACCELERATE_USE_FSDP"] == "true"
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"  # the base is bfloat16 by itself
    for name, value in env.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FullOptimStateDictConfig  # noqa: F401  accelerate finds it by name

    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is True
    assert plugin.cpu_ram_efficient_loading is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.auto_wrap_policy is not None
    assert "transformer_auto_wrap_policy" in str(getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy))


@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, env = handed_over(f"deepspeed-zero{stage}", monkeypatch)
    assert args.use_deepspeed
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert env["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(stage == "3").lower()


def test_profiles_are_found_by_name_and_by_file(tmp_path: Path) -> None:
    assert launch.names() == ["ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2"]
    own = tmp_path / "own.yaml"
    own.write_text(launch.profile_file("ddp").read_text())
    assert launch.profile_file(str(own)) == own
    with pytest.raises(RunError, match=r"neither a profile \(ddp, .*\) nor a file, did you mean 'fsdp2'"):
        launch.profile_file("fsdp")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no config file of accelerate"),
        ("just text", "is no config file of accelerate"),
        ("num_procs: 2", "is no config file of accelerate"),
    ],
)
def test_a_file_that_accelerate_cannot_read(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(RunError, match=said):
        launch.read_profile(file)


def count(profile: str, wanted: int | None, monkeypatch: pytest.MonkeyPatch, *, devices: int) -> int:
    monkeypatch.setattr(launch, "on_cpu", lambda: devices == 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    return launch.count_processes(launch.read_profile(launch.profile_file(profile)), wanted)


def test_one_process_a_device_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count("fsdp2", None, monkeypatch, devices=8) == 8
    assert count("ddp", 3, monkeypatch, devices=8) == 3
    assert count("ddp", 2, monkeypatch, devices=0) == 2


def test_what_cannot_be_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="--processes 9: torch finds 8 devices here"):
        count("ddp", 9, monkeypatch, devices=8)
    with pytest.raises(RunError, match="Say how many processes are to share the CPU: --processes 2"):
        count("ddp", None, monkeypatch, devices=0)
    with pytest.raises(RunError, match=r"shards over GPUs, and torch finds none here \(FSDP\)"):
        count("fsdp2", 2, monkeypatch, devices=0)
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match="needs deepspeed, not installed here. .*pip install 'veneer.deepspeed.'"
    ):
        count("deepspeed-zero3", 2, monkeypatch, devices=8)


def test_no_processes_out_of_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="this is one of several already"):
        launch.launch("ddp", 2, [], kept=str)


def test_a_process_that_was_killed_is_told_of() -> None:
    def failed(code: int) -> SimpleNamespace:
        return SimpleNamespace(get_first_failure=lambda: (1, SimpleNamespace(exitcode=code)))

    assert launch._exit_code(failed(2), str) == 2
    with pytest.raises(RunError, match="Process 1 of this run was killed by signal 9, .*Kept: checkpoint-2"):
        launch._exit_code(failed(-9), lambda: "Kept: checkpoint-2.")


@pytest.fixture(autouse=True)
def environment():
    """accelerate writes into the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

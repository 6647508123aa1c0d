"""A run on several devices: `veneer train … --launch PROFILE` starts one process a device through accelerate.

A profile is one of accelerate's own config files: those in profiles/, or a file of the user's. `accelerate launch
--config_file PROFILE --num_processes N -m veneer.cli train …` and torchrun start the very same processes.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import RunError
from veneer.suggest import did_you_mean
from veneer.train.ranks import number, on_cpu
from veneer.train.zero import require_deepspeed

PROFILES = Path(__file__).parent / "profiles"
NEEDS_ACCELERATOR = ("FSDP",)


def names() -> list[str]:
    """The profiles that come with Veneer."""
    return sorted(file.stem for file in PROFILES.glob("*.yaml"))


def profile_file(profile: str) -> Path:
    """Where a profile is: one of ours by its name, else a file. RunError if there is none."""
    if profile in names():
        return PROFILES / f"{profile}.yaml"
    if Path(profile).is_file():
        return Path(profile)
    near = did_you_mean(profile, names()) or "."
    raise RunError(f"--launch {profile}: neither a profile ({', '.join(names())}) nor a file{near}")


def read_profile(file: Path) -> Any:
    """accelerate's ClusterConfig; RunError if accelerate cannot read it, or it is for another kind of machine."""
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    try:
        config = load_config_from_file(str(file))
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"{file} is no config file of accelerate: {reason} `accelerate config` writes one.") from None
    if not isinstance(config, ClusterConfig):
        raise RunError(f"{file} is for a service (compute_environment), not for machines that run processes.")
    return config


def count_processes(config: Any, wanted: int | None) -> int:
    """How many processes to start here: what is asked for, else what the file says, else one a device.

    RunError if there are fewer devices, or the profile needs another kind; MissingPackageError without DeepSpeed.
    """
    import torch

    kind = getattr(config.distributed_type, "value", str(config.distributed_type))
    devices = 0 if config.use_cpu or on_cpu() else torch.accelerator.device_count()
    if kind == "DEEPSPEED":
        require_deepspeed()
        if not devices:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it says that it finds no other
    if kind in NEEDS_ACCELERATOR and not devices:
        raise RunError(f"This profile shards over GPUs, and torch finds none here ({kind}). On CPUs: --launch ddp.")
    if config.num_machines > 1:
        return wanted or config.num_processes  # of all machines together; each counts its own
    count = wanted or (config.num_processes if config.num_processes > 0 else devices)
    if count < 1:
        raise RunError("torch finds no accelerator here. Say how many processes are to share the CPU: --processes 2")
    if devices and count > devices:
        raise RunError(f"--processes {count}: torch finds {devices} device{'s' * (devices > 1)} here.")
    return count


def launch(profile: str, processes: int | None, arguments: Sequence[str], *, kept: Callable[[], str]) -> int:
    """Run `veneer train` with these arguments in several processes; their exit code, once all have ended.

    kept  says what is left of a run that was killed

    A process that fails has said why; the others are ended. Raises what `profile_file`, `read_profile` and
    `count_processes` raise, before any process is started; and RunError if one was killed.
    """
    if number() > 1:
        raise RunError("--launch starts processes, and this is one of several already: leave it out under torchrun.")
    file = profile_file(profile)
    config = read_profile(file)
    count = count_processes(config, processes)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    says = ["--config_file", str(file), "--num_processes", str(count)]
    if config.num_machines == 1 and config.main_process_port is None:
        says += ["--main_process_port", "0"]  # one that is free
    threads = os.environ.get("OMP_NUM_THREADS") or str(_threads(count))
    says += ["--num_cpu_threads_per_process", threads, "--module", "veneer.cli", "train"]
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the process that failed says more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            launch_command(launch_command_parser().parse_args([*says, *arguments]))
        except ChildFailedError as error:
            return _exit_code(error, kept)
        except SignalException as stop:
            return 128 + int(stop.sigval)
    return 0


def _threads(processes: int) -> int:
    return max(1, (os.cpu_count() or 1) // processes)


def _exit_code(error: Any, kept: Callable[[], str]) -> int:
    """That of the process that failed first. One that was killed could not say so: RunError says it."""
    rank, first = error.get_first_failure()
    if first.exitcode < 0:
        raise RunError(
            f"Process {rank} of this run was killed by signal {-first.exitcode}, perhaps for want of memory. " + kept()
        )
    return first.exitcode

"""Run by torchrun: `train` under DeepSpeed's ZeRO 2 and 3, as their profiles ask for it, on CPU processes.

torchrun --nproc-per-node 2 zero_runs.py FOLDER     runs of one process lie there already
"""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from distributed.zero_cases import CASES, COMMON, HALVES
from train.tiny_run import settings
from veneer.errors import RunError
from veneer.train import run
from veneer.train.launch import profile_file
from veneer.train.ranks import join


def as_the_profile_says(profile: str) -> None:
    """The environment that `--launch PROFILE` gives each process."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    words = ["--config_file", str(profile_file(profile)), "--num_processes", "2", "--main_process_port", "0", "x.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    handed = prepare_deepspeed_cmd_env(args)[1]
    os.environ.update({name: value for name, value in handed.items() if name.startswith("ACCELERATE_")})


def main(folder: Path) -> None:
    model, rows = folder / "model", folder / "rows.jsonl"
    trainers = []
    inner = run.build_trainer

    def watched(*args, **options):
        trainers.append(inner(*args, **options))
        return trainers[-1]

    def trained(name: str, **changes) -> None:
        top = {key: changes.pop(key) for key in ("dtype", "quantization") if key in changes}
        run.train(settings(model, rows, folder / name, **{**COMMON, **changes}).model_copy(update=top))

    run.build_trainer = watched
    for stage in (2, 3):
        # own.yaml is deepspeed-zero3, but so that nothing is small enough to be left whole
        profile = "deepspeed-zero2" if stage == 2 else str(folder / "own.yaml")
        as_the_profile_says(profile)
        for name, changes in CASES.items():
            if stage in changes["stages"]:
                trained(f"zero{stage}-{name}", **changes["settings"])
        if stage == 3:
            away = [name for name, p in trainers[-1].model.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
            assert not away, away
        assert join().count == 2
        trained(f"zero{stage}-begun", **HALVES[0])
        refused(lambda: trained("bad", optimizer="lorafa"), "LoRA-FA needs the A and B of each layer")
    refused(
        lambda: trained("bad", dtype="bfloat16", lora={"modules_to_save": ["lm_head"]}), "trains parameters of one dtype"
    )
    refused(lambda: trained("bad", lora={"init_lora_weights": "loftq"}), "exchanges weights of the base")
    refused(lambda: trained("bad", quantization="nf4"), "ZeRO-3 cannot cut such weights into shards")
    trained("zero2-begun", **HALVES[1])  # what ZeRO 2 began
    trained("one-begun", **HALVES[1])  # what one process began, with the optimizer's state whole
    as_the_profile_says("deepspeed-zero2")
    trained("one-begun-too", **HALVES[1])
    assert not (folder / "bad").exists()


def refused(act, said: str) -> None:
    try:
        act()
    except RunError as error:
        assert said in str(error) or "says what is wrong" in str(error), error
    else:
        raise AssertionError(said)


if __name__ == "__main__":
    from veneer.distributed.gloo import wait_for_gloo

    warnings.filterwarnings("ignore", category=FutureWarning)  # what DeepSpeed calls of torch
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
    wait_for_gloo()

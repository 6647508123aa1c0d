"""Run by torchrun: `train` under accelerate's FSDP2, as the profile fsdp2 asks for it, on CPU processes.

accelerate counts the CPU among no kinds of devices that FSDP runs on, though FSDP2 does: here it takes it for one.

torchrun --nproc-per-node 2 train_sharded.py FOLDER
"""

import os
import sys
import warnings
from pathlib import Path

import accelerate.state as theirs
import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

from train.tiny_run import settings
from veneer.train import build, run
from veneer.train.launch import profile_file


def as_the_profile_says() -> None:
    """The environment that `--launch fsdp2` gives each process, and an accelerate that takes the CPU for a GPU."""
    words = ["--config_file", str(profile_file("fsdp2")), "--num_processes", "2", "--main_process_port", "0", "x.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    handed = prepare_multi_gpu_env(args)
    os.environ.update({name: value for name, value in handed.items() if name.startswith(("FSDP_", "ACCELERATE_"))})
    prepare = theirs.PartialState._prepare_backend

    def as_gpus(self, cpu=False, *rest, **options):
        backend, kind = prepare(self, True, *rest, **options)
        return backend, DistributedType.MULTI_GPU if kind == DistributedType.MULTI_CPU else kind

    theirs.PartialState._prepare_backend = as_gpus
    theirs.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    build.on_cpu = lambda: False


def is_four_bits(layer: torch.nn.Module) -> bool:
    return any(one.__name__ == "Linear4bit" for one in type(layer).__mro__)


def main(folder: Path) -> None:
    model, rows = folder / "model", folder / "rows.jsonl"
    common = {"batch_size": 2, "epochs": 2, "max_steps": None, "data": {"eval_fraction": 0.3}}
    shards = []
    inner = run.build_trainer

    def watched(*args, **options):
        shards.append(inner(*args, **options))
        return shards[-1]

    run.build_trainer = watched
    begun = {**common, "max_steps": 3, "epochs": None, "schedule": "constant", "save_every": 2, "eval_every": 2}
    run.train(settings(model, rows, folder / "fsdp-resumed", **begun))
    plain = [name for name, value in shards[0].model.named_parameters() if not isinstance(value, DTensor)]
    assert not plain, (shards[0].accelerator.distributed_type, plain)
    run.train(settings(model, rows, folder / "fsdp-resumed", **{**begun, "max_steps": 6, "resume": True}))
    run.train(settings(model, rows, folder / "fsdp-dora", lora={"use_dora": True}, group_by_length=False, **common))
    run.train(settings(model, rows, folder / "fsdp-pissa", lora={"init_lora_weights": "pissa"}, **common))
    four_bits = settings(model, rows, folder / "fsdp-nf4", **common)
    run.train(four_bits.model_copy(update={"quantization": "nf4"}))
    weights = [layer.weight for layer in shards[-1].model.modules() if is_four_bits(layer)]
    assert weights
    assert all(isinstance(weight, DTensor) for weight in weights)


if __name__ == "__main__":
    from veneer.distributed.gloo import wait_for_gloo

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing is done to what the head answers
    as_the_profile_says()
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
    wait_for_gloo()

"""Run by torchrun, or alone: a training run that goes on from its last checkpoint, and may be killed on the way.

torchrun --nproc-per-node N resumed.py FOLDER SPREAD OPTIMIZER [kill STEP]

SPREAD is fsdp2, ddp or alone. It writes a checkpoint after every second step, and its adapter to FOLDER/adapter.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import veneer
from veneer.distributed import load_checkpoint, save_checkpoint, wait_for_gloo

STEPS, ROWS = 8, 4


def made(spread: str, kind: str) -> tuple[Any, Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = veneer.LoraConfig(r=3, target_modules="all-linear", use_dora=kind == "adamw", modules_to_save=["norm"])
    model: Any = veneer.get_peft_model(tiny.llama(), config)
    called = model
    if spread == "fsdp2":
        veneer.shard(model)
    if kind == "lorafa":
        optimizer: Any = veneer.create_lorafa_optimizer(model, r=3, lora_alpha=8, lr=1e-2, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if spread == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    return model, called, optimizer


def batches(rank: int, ranks: int) -> Tensor:
    """Of each step this rank's part of the same rows, whatever their number of ranks."""
    tokens = torch.randint(1, 64, (STEPS, ROWS, 10), generator=torch.Generator().manual_seed(2))
    each = ROWS // ranks
    return tokens[:, rank * each : (rank + 1) * each]


def main(place: str, spread: str, kind: str, *words: str) -> None:
    rank = ranks = None
    if spread == "alone":
        rank, ranks = 0, 1
    else:
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = Path(place)
    model, called, optimizer = made(spread, kind)
    done, step = sorted(folder.glob("step-*")), 0
    if done:
        step = load_checkpoint(done[-1], model, optimizer)["step"]
    print(f"rank {rank} of {ranks} begins after step {step}", flush=True)
    for batch in batches(rank, ranks)[step:]:
        called(input_ids=batch, labels=batch).loss.backward()
        if "kill" in words and step == int(words[-1]) and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        if step % 2 == 0:
            save_checkpoint(folder / f"step-{step:03}", model, optimizer, progress={"step": step})
    if rank == 0 or spread == "fsdp2":
        model.save_pretrained(folder / "adapter")
    if dist.is_initialized():
        dist.destroy_process_group()
        wait_for_gloo()


if __name__ == "__main__":
    main(*sys.argv[1:])

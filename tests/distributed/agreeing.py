"""Run by torchrun on two ranks: what is wrong on one rank ends the call on both, with an error that says where.

torchrun --nproc-per-node 2 agreeing.py FOLDER [nan]

With `nan` nothing is caught: the program ends as a training run would.
"""

import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import veneer
from veneer.distributed import all_ranks, load_checkpoint, save_checkpoint, wait_for_gloo
from veneer.errors import (
    AdapterFileError,
    AttachError,
    ConfigError,
    DataError,
    MergeError,
    RankError,
    VeneerError,
)


def fails(what: str, call: Callable[[], Any], *, here: tuple[type[VeneerError], str], there: str = "") -> None:
    """The call raises `here` on rank 1, and on rank 0 the same, or RankError with `there` in it."""
    kind, words = here if dist.get_rank() == 1 or not there else (RankError, there)
    with pytest.raises(kind, match=re.escape(words)):
        call()
    if dist.get_rank() == 0:
        print(f"refused: {what}", flush=True)


def adapted(model: nn.Module | None = None, **fields: Any) -> Any:
    return veneer.get_peft_model(
        model or tiny.llama(), veneer.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **fields})
    )


def check_shard(rank: int) -> None:
    fails("no adapter", lambda: veneer.shard(tiny.llama()), here=(AttachError, "attach it first"))
    merged = adapted()
    if rank == 1:
        merged.merge_adapter()
    fails("merged on one rank", lambda: veneer.shard(merged), here=(AttachError, "merged"), there="rank 1: AttachError")
    other = adapted(r=4 + rank)
    fails(
        "other ranks", lambda: veneer.shard(other), here=(RankError, "the config of adapter"), there="rank 1: RankError"
    )
    base = adapted()
    with torch.no_grad():
        base.get_base_model().model.norm.weight.mul_(1 + rank)
    fails("another base", lambda: veneer.shard(base), here=(RankError, "norm.weight"), there="rank 1: RankError")
    mixed = adapted(tiny.llama(dtype=torch.bfloat16), bias="none")
    mixed.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)
    fails("mixed dtypes", lambda: veneer.shard(mixed), here=(AttachError, "has several dtypes"))
    wrapped = nn.parallel.DistributedDataParallel(adapted())
    fails("in DDP", lambda: veneer.shard(wrapped), here=(AttachError, "DistributedDataParallel"))
    whole = adapted(tiny.llama())
    whole.get_base_model().lm_head.weight = nn.Parameter(torch.ones(64, 32, dtype=torch.int8), requires_grad=False)
    fails("int8", lambda: veneer.shard(whole), here=(AttachError, "is quantised"))


def check_attaching() -> None:
    plain = tiny.llama()
    plain.lm_head.weight.requires_grad_(True)
    ddp = nn.parallel.DistributedDataParallel(plain)
    fails("attaching to DDP", lambda: adapted(ddp), here=(AttachError, "Attach the adapter first"))
    fails("attaching inside DDP", lambda: adapted(plain), here=(AttachError, "Attach the adapter first"))


def check_sharded(rank: int, folder: Path) -> None:
    torch.manual_seed(rank)  # adapters start differently, and become those of the first rank
    model = adapted(tiny.gpt2(), bias="lora_only", target_modules=["c_fc"])
    before = veneer.get_peft_model_state_dict(model)
    veneer.shard(model)
    model(input_ids=tiny.ids())  # leaves some weights gathered
    after = veneer.get_peft_model_state_dict(model)
    assert rank == 1 or all(torch.equal(before[key], after[key]) for key in before)
    sums = [float(sum(value.double().sum() for value in after.values()))] * 2
    dist.all_gather_object(sums, sums[0])
    assert sums[0] == sums[1], "the ranks have different adapters"

    other = veneer.LoraConfig(r=2, target_modules=["c_attn"])
    fails("biases exchanged", model.disable_adapter_layers, here=(AttachError, "cannot be exchanged"))
    fails("sharded twice", lambda: veneer.shard(model), here=(AttachError, "sharded already"))
    fails("attached late", lambda: model.add_adapter("late", other), here=(AttachError, "Attach the adapter"))
    fails("merged late", model.merge_and_unload, here=(MergeError, "veneer merge"))
    fails("removed", lambda: model.delete_adapter("default"), here=(AttachError, "cannot be removed"))
    model.save_pretrained(folder / "saved")
    with torch.no_grad():
        expected = model(input_ids=tiny.ids()).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(3)
    model.load_adapter(folder / "saved", "default")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tiny.ids()).logits, expected)
    place = folder / ("saved" if rank == 0 else "absent")
    fails(
        "a file that one rank lacks",
        lambda: model.load_adapter(place, "default"),
        here=(AdapterFileError, "absent"),
        there="rank 1: AdapterFileError",
    )
    broken = {key: value * (float("nan") if rank else 1) for key, value in after.items()}
    fails(
        "NaN in values",
        lambda: veneer.set_peft_model_state_dict(model, broken),
        here=(AdapterFileError, "NaN"),
        there="rank 1: AdapterFileError",
    )
    check_checkpoints(model, folder)


def check_checkpoints(model: Any, folder: Path) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    place = folder / "checkpoint"
    odd = {"step": object()}
    fails("odd progress", lambda: save_checkpoint(place, model, progress=odd), here=(ConfigError, "JSON"))
    assert not place.exists()
    save_checkpoint(place, model, optimizer, progress={"step": 3})
    dist.barrier()
    assert load_checkpoint(place, model, optimizer) == {"step": 3}
    assert load_checkpoint(place, model) == {"step": 3}
    fails("written twice", lambda: save_checkpoint(place, model), here=(AdapterFileError, "a folder of its own"))
    stranger = veneer.shard(adapted(r=2))
    fails("another adapter", lambda: load_checkpoint(place, stranger), here=(AdapterFileError, "r of adapter"))
    old = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    fails("an old optimizer", lambda: load_checkpoint(place, model, old), here=(ConfigError, "after veneer.shard"))
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    fails("another optimizer", lambda: load_checkpoint(place, model, sgd), here=(AdapterFileError, "AdamW there"))
    dist.barrier()
    if dist.get_rank() == 0:
        next(iter(place.glob("*.safetensors"))).unlink()
    dist.barrier()
    fails("a file is lost", lambda: load_checkpoint(place, model), here=(AdapterFileError, "lacks"))


def check_meetings(rank: int) -> None:
    def elsewhere() -> None:
        with all_ranks("counting" if rank == 0 else "sorting"):
            pass

    fails("at different places", elsewhere, here=(RankError, "not at the same place"))
    if rank == 0:  # the other does not come; last, for after that the ranks are apart
        with pytest.raises(RankError, match="rank 1 did not come within 1 seconds"), all_ranks("saving", seconds=1):
            pass
        print("refused: on the first rank only", flush=True)
    else:
        time.sleep(2)


def diverge(rank: int) -> None:
    """A run that a bad row on one rank would let hang in the next collective."""
    model = veneer.shard(adapted())
    for step in range(3):
        loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
        if rank == 1 and step == 1:
            loss = loss * float("nan")
        with all_ranks(f"step {step}"):
            if not loss.isfinite():
                raise DataError(f"The loss of step {step} is not finite.")
        loss.backward()


def main(folder: str, *words: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if "nan" in words:
        diverge(rank)
    check_shard(rank)
    check_attaching()
    check_sharded(rank, Path(folder))
    check_meetings(rank)
    dist.destroy_process_group()
    wait_for_gloo()


if __name__ == "__main__":
    main(*sys.argv[1:])

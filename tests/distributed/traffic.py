"""Run by torchrun: the bytes that a step sends, counted at torch's collectives, are those of the arithmetic.

torchrun --nproc-per-node 2 traffic.py ddp|fsdp2. Prints "equal" on success.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.distributed import wait_for_gloo
from veneer.train.estimate import Profile, Run, Shape, traffic

TINY = Shape("tiny", width=32, mlp=48, layers=3, heads=4, kv_heads=2, vocabulary=64)
RANK = 4


class Sent(TorchDispatchMode):
    """What this rank sends, if a ring adds up, gathers or scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, ranks = func.name(), dist.get_world_size()
        times, largest = {
            "c10d::allreduce_": (2, 0),
            "c10d::_allgather_base_": (1, 0),
            "c10d::_reduce_scatter_base_": (1, 1),
        }.get(name, (0, 0))
        if times:
            given = args[largest] if isinstance(args[largest], list | tuple) else [args[largest]]
            self.bytes += times * sum(t.nbytes for t in given) * (ranks - 1) / ranks
        elif name.startswith("c10d::"):
            assert "wait" in name or "monitored" in name, name
        return func(*args, **(kwargs or {}))


def main(profile: Profile) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(**TINY.llama_config, pad_token_id=0)
    model: Any = veneer.get_peft_model(
        LlamaForCausalLM(config), veneer.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ids = torch.arange(3, 11).reshape(1, 8)
    if profile == "ddp":
        model = DistributedDataParallel(model, broadcast_buffers=False)  # a few bytes: the rotary frequencies
    else:
        model = veneer.shard(model, reshard_after_forward=True)
    for _ in range(2):  # between its first two steps DDP agrees on an order
        model(input_ids=ids, labels=ids).loss.backward()
    with Sent() as sent:
        model(input_ids=ids, labels=ids).loss.backward()
    run = Run(TINY, keeping="float32", rank=RANK)
    expected = traffic(run, profile, dist.get_world_size())
    assert sent.bytes == expected, (sent.bytes, expected)
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()
    wait_for_gloo()


if __name__ == "__main__":
    main(sys.argv[1])  # type: ignore[arg-type]

"""Run by torchrun: training steps on sharded layers equal those of one process. Prints "equal" on success.

torchrun --nproc-per-node 2 sharded_step.py block|layer|attention [dora] [dropout]
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import veneer
from veneer.distributed.gloo import wait_for_gloo


class Attention(nn.Module):
    """Attention without the softmax: three layers read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)) * self.v_proj(x))


class Block(nn.Module):
    """Attention and a gated MLP, in which two layers read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


def made(**fields) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    veneer.inject_adapter_in_model(veneer.LoraConfig(r=2, target_modules="all-linear", **fields), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.double()
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def steps(model: nn.Module, batches: Tensor) -> list[Tensor]:
    """Adapters after three steps; each batch is the mean over its rows, and over ranks."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in trained]


def main(where: str, *words: str) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = made(use_dora="dora" in words)
    sharded = copy.deepcopy(whole)
    for block in sharded:
        if where == "layer":
            for layer in [m for m in block.modules() if isinstance(m, nn.Linear)]:
                fully_shard(layer, reshard_after_forward="kept" not in words)
        if where == "attention":
            fully_shard(block.attention)
        fully_shard(block, reshard_after_forward="kept" not in words)
    fully_shard(sharded)
    batches = torch.randn(3, 2 * ranks, 16, 8, generator=torch.Generator().manual_seed(1)).double()
    expected = steps(whole, batches)
    found = steps(sharded, batches[:, 2 * rank : 2 * rank + 2])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    dist.destroy_process_group()
    if rank == 0:
        print("equal")
    wait_for_gloo()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run by torchrun: the loss of `veneer train` under DistributedDataParallel, taken in the head and from the logits,
gives the gradients of one process. Prints a line for each way.

torchrun --nproc-per-node N training_loss.py
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import veneer
from veneer.distributed import wait_for_gloo
from veneer.train.loss import plain_head, summed_loss
from veneer.train.tokens import IGNORED


def gradients(model: nn.Module, called: nn.Module, ids: Tensor, labels: Tensor, head: Any, count: int) -> list[Tensor]:
    """The gradients of the mean over all learned tokens of the batch, of which this process has a part."""
    model.zero_grad()
    loss, _ = summed_loss(called, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, head)
    (loss / count).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(r=4, target_modules="all-linear")).train()
    tiny.shake(whole)
    spread = copy.deepcopy(whole)
    ids = torch.randint(1, 64, (2 * ranks, 10), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    for row in range(len(ids)):  # rows that learn different numbers of tokens
        labels[row, : 2 + row] = IGNORED
    count = int((labels[:, 1:] != IGNORED).sum())
    mine = slice(2 * rank, 2 * rank + 2)
    for way in ("in the head", "from the logits"):
        head, own = (plain_head(whole), plain_head(spread)) if way == "in the head" else (None, None)
        assert (head is None) == (way != "in the head")
        expected = gradients(whole, whole, ids, labels, head, count)
        ddp = nn.parallel.DistributedDataParallel(spread)
        for _ in range(2):  # DDP complains in the second forward if a gradient of the first did not come
            found = gradients(spread, ddp, ids[mine], labels[mine], own, count)
        for one, other in zip(found, expected, strict=True):  # DDP takes the mean over ranks of what is a sum
            torch.testing.assert_close(one * ranks, other, rtol=1e-5, atol=1e-6)
        parallel = nn.DataParallel(whole)  # which is the model itself where there is no GPU
        for one, other in zip(gradients(whole, parallel, ids, labels, head, count), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        if rank == 0:
            print(f"equal {way}", flush=True)
    dist.destroy_process_group()
    wait_for_gloo()


if __name__ == "__main__":
    main()

"""Run by torchrun: a step under torch's older FullyShardedDataParallel, wrapped as `fsdp_auto_wrap_policy` says, with
flat parameters: the gradients are those of one process.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import veneer
from veneer.distributed import wait_for_gloo


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = {"r": 4, "target_modules": "all-linear"}
    for name, more in {"plain": {}, "dora": {"use_dora": True}, "copies": {"modules_to_save": ["lm_head"]}}.items():
        whole = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**config, **more)).train()
        tiny.shake(whole)
        spread = FullyShardedDataParallel(
            copy.deepcopy(whole),
            auto_wrap_policy=veneer.fsdp_auto_wrap_policy(whole),
            use_orig_params=False,
            device_id=torch.device("cpu"),
        )
        ids = torch.randint(1, 64, (2 * ranks, 10), generator=torch.Generator().manual_seed(3))
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (whole, spread)]
        whole(input_ids=ids, labels=ids).loss.backward()
        mine = ids[2 * rank : 2 * rank + 2]
        spread(input_ids=mine, labels=mine).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        trained = {name: p.detach() for name, p in whole.named_parameters() if p.requires_grad}
        with FullyShardedDataParallel.summon_full_params(spread):
            found = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in spread.named_parameters()}
            for key, value in trained.items():
                torch.testing.assert_close(found[key].detach(), value, rtol=1e-5, atol=1e-6)
        if rank == 0:
            print(f"equal: {name}", flush=True)
    dist.destroy_process_group()
    wait_for_gloo()


if __name__ == "__main__":
    main()

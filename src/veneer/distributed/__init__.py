"""Many processes: what a model spread over several devices needs."""

from veneer.distributed.checkpoint import load_checkpoint, save_checkpoint
from veneer.distributed.gloo import wait_for_gloo
from veneer.distributed.load_base import load_base
from veneer.distributed.shard import shard
from veneer.distributed.wrap_policy import fsdp_auto_wrap_policy
from veneer.model.ranks import all_ranks

__all__ = [
    "all_ranks",
    "fsdp_auto_wrap_policy",
    "load_base",
    "load_checkpoint",
    "save_checkpoint",
    "shard",
    "wait_for_gloo",
]

"""Tensors that are spread over several devices (torch's DTensor), as `fully_shard` makes parameters.

Each rank has some rows of one. FSDP holds the local part itself, so values are changed there and nowhere else.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Not imported with torch; as long as nobody does, there is no such tensor or model.
_HOME, _FSDP = "torch.distributed.tensor", "torch.distributed.fsdp"


def one_of_several() -> bool:
    """Whether this process is one of a group. Otherwise nothing is sharded, and no model needs to be looked through."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over several devices."""
    return _HOME in sys.modules and isinstance(tensor, sys.modules[_HOME].DTensor)


def any_sharded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of these tensors is spread over several devices."""
    return one_of_several() and _HOME in sys.modules and any(map(is_sharded, tensors))


def reshard(model: nn.Module) -> None:
    """Let the parameters of a sharded model be its shards: a forward without a backward leaves some gathered.

    What is changed in a gathered one is lost. Does nothing to any other model.
    """
    if not one_of_several() or _FSDP not in sys.modules:
        return
    kind: Any = vars(sys.modules[_FSDP])["FSDPModule"]
    groups: list[Any] = [module for module in model.modules() if isinstance(module, kind)]
    for group in groups:
        group.reshard()


def whole(tensor: Any) -> Tensor:
    """The whole tensor, detached: itself, or gathered, in which all ranks of its mesh must take part."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def local(tensor: Any) -> Tensor:
    """What of the tensor is on this rank, to be read or changed in place: all of it, if it is not spread."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def rows_here(tensor: Any) -> slice:
    """Which rows (of the first dimension) of a tensor are on this rank: all of them, if it is not spread.

    They are spread as `torch.chunk` does, the last ranks having fewer rows or none.
    """
    first, count = 0, tensor.shape[0] if tensor.dim() else 1
    for dim, placement in enumerate(tensor.placements if is_sharded(tensor) else ()):
        if placement.is_shard():
            assert placement.dim == 0
            each = -(-count // tensor.device_mesh.size(dim))
            start = min(each * tensor.device_mesh.get_local_rank(dim), count)
            first, count = first + start, min(each, count - start)
    return slice(first, first + count)


@torch.no_grad()
def put(tensor: Any, value: Tensor) -> None:
    """Give a tensor the values of another one, which is whole and the same on all ranks."""
    assert tensor.shape == value.shape
    local(tensor).copy_(value[rows_here(tensor)] if is_sharded(tensor) else value)


def ranks_of(tensor: Any) -> list[int]:
    """The ranks over which a tensor is spread, the first one first."""
    return tensor.device_mesh.mesh.flatten().tolist()

"""Tensors that are spread over several devices: torch's DTensor, as `fully_shard` makes parameters, and parameters
that DeepSpeed's ZeRO 3 partitions. Nothing else in Veneer looks at how they are kept.

A rank has some rows of a DTensor. FSDP holds the local part itself, so values are changed there and nowhere else. Of a
partitioned parameter a rank has a piece of its numbers in a row, and what is seen of it is empty; DeepSpeed gathers
those of a module for as long as that runs.
"""

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Not imported with torch; as long as nobody does, there is no such tensor or model.
_HOME, _FSDP, _DEEPSPEED = "torch.distributed.tensor", "torch.distributed.fsdp", "deepspeed"


def one_of_several() -> bool:
    """Whether this process is one of a group. Otherwise nothing is sharded, and no model needs to be looked through."""
    return dist.is_available() and dist.is_initialized()


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return _HOME in sys.modules and isinstance(tensor, sys.modules[_HOME].DTensor)


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO 3 keeps a parameter in parts, gathered just now or not."""
    return _DEEPSPEED in sys.modules and hasattr(tensor, "ds_id")


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over several devices."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def any_sharded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of these tensors is spread over several devices."""
    return one_of_several() and any(map(is_sharded, tensors))


def any_partitioned(tensors: Iterable[Tensor | None]) -> bool:
    """Whether ZeRO 3 keeps one of these tensors in parts."""
    return _DEEPSPEED in sys.modules and one_of_several() and any(map(is_partitioned, tensors))


def is_away(tensor: Any) -> bool:
    """Whether ZeRO 3 keeps a parameter in parts, and it is not gathered just now."""
    return is_partitioned(tensor) and tensor.ds_status.name != "AVAILABLE"


def shape_of(tensor: Any) -> torch.Size:
    """The shape of the whole tensor."""
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape


def size_of(tensor: Any) -> int:
    """How many numbers the whole tensor has."""
    return tensor.ds_numel if is_partitioned(tensor) else tensor.numel()


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
    """The whole tensor, detached: itself, or gathered, in which all ranks that have parts of it must take part."""
    if is_away(tensor):
        with _zero().GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor.detach()


def gathered(module: nn.Module) -> AbstractContextManager[Any]:
    """Within the block the parameters of a module are whole, to be read, if it is ZeRO 3 that keeps them in parts."""
    away = [parameter for parameter in module.parameters() if is_away(parameter)]
    return _zero().GatheredParameters(away) if away else nullcontext()


def local(tensor: Any) -> Tensor:
    """What of a DTensor is on this rank, to be read or changed in place; any other tensor is all here."""
    assert not is_partitioned(tensor)
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor


def rows_here(tensor: Any) -> slice:
    """Which rows (of the first dimension) of a tensor are on this rank: all of them, if it is no DTensor.

    They are spread as `torch.chunk` does, the last ranks having fewer rows or none.
    """
    assert not is_partitioned(tensor)
    first, count = 0, tensor.shape[0] if tensor.dim() else 1
    for dim, placement in enumerate(tensor.placements if is_dtensor(tensor) else ()):
        if placement.is_shard():
            assert placement.dim == 0
            each = -(-count // tensor.device_mesh.size(dim))
            start = min(each * tensor.device_mesh.get_local_rank(dim), count)
            first, count = first + start, min(each, count - start)
    return slice(first, first + count)


@torch.no_grad()
def put(tensor: Any, value: Tensor) -> None:
    """Give a tensor the values of another one, which is whole and the same on all ranks."""
    assert shape_of(tensor) == value.shape
    if is_partitioned(tensor):
        with _zero().GatheredParameters([tensor], modifier_rank=0):
            tensor.data.copy_(value)
        return
    local(tensor).copy_(value[rows_here(tensor)] if is_dtensor(tensor) else value)


def has_master(parameter: Any) -> bool:
    """Whether DeepSpeed has a float32 copy of a parameter, which is what it steps: since `deepspeed.initialize`."""
    of_deepspeed = _DEEPSPEED in sys.modules
    return of_deepspeed and (hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"))


def put_into_master(parameter: Any, value: Tensor) -> None:
    """Give that copy a value that the parameter got, which is whole and the same on all ranks."""
    deepspeed: Any = sys.modules[_DEEPSPEED]
    deepspeed.utils.safe_set_full_fp32_param(parameter, value.detach().to(torch.float32))


def ranks_of(tensor: Any) -> list[int]:
    """The ranks over which a tensor is spread, the first one first."""
    if is_partitioned(tensor):
        return dist.get_process_group_ranks(tensor.ds_process_group)
    return tensor.device_mesh.mesh.flatten().tolist()


def reads_from(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let ZeRO 3 gather these parameters, too, when the module runs: it reads them without calling what has them."""
    for parameter in parameters:
        _zero().register_external_parameter(module, parameter)


def is_run_by_deepspeed(model: nn.Module) -> bool:
    """Whether `deepspeed.initialize` has taken over a model whose parameters it partitions."""
    return _DEEPSPEED in sys.modules and any("ds_id" in vars(module) for module in model.modules())


def _zero() -> Any:
    return sys.modules[_DEEPSPEED].zero

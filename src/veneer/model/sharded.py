"""A model over several devices, and what cannot be done to it any more: adapters come first, then the devices."""

import gc
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from veneer.errors import AttachError, VeneerError
from veneer.layers.by_weight import ByWeight
from veneer.layers.sharded import (
    any_sharded,
    is_dtensor,
    is_run_by_deepspeed,
    is_sharded,
    one_of_several,
    ranks_of,
    reads_from,
    reshard,
)
from veneer.layers.token_rows import WithRows
from veneer.model.ranks import all_ranks
from veneer.model.wrapped import inwards

_DDP, _FSDP1 = nn.parallel.DistributedDataParallel, "torch.distributed.fsdp.fully_sharded_data_parallel"


def is_sharded_model(model: nn.Module) -> bool:
    """Whether parameters of the model are spread over several devices (`fully_shard`, tensor parallelism)."""
    reshard(model)
    return any_sharded(model.parameters())


def ranks_of_model(model: nn.Module) -> list[int] | None:
    """The ranks over which the model's parameters are spread, the first one first; None if they are not."""
    reshard(model)
    if not one_of_several():
        return None
    return next((ranks_of(parameter) for parameter in model.parameters() if is_sharded(parameter)), None)


def on_all_ranks(model: nn.Module, what: str) -> AbstractContextManager[None]:
    """`all_ranks` over those that share a sharded model; nothing for any other."""
    ranks = ranks_of_model(model)
    return nullcontext() if ranks is None else all_ranks(what, ranks)


def read_by_owners(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(owner, what of ours its forward reads the parameters of, instead of calling it)."""
    for module in model.modules():
        if isinstance(module, ByWeight):
            yield module, module.adapters
        if isinstance(module, WithRows):
            yield module, module.token_rows


def follow_zero3(model: nn.Module) -> None:
    """Let ZeRO 3, which gathers the parameters of what is called, gather those that are read."""
    for owner, part in read_by_owners(model):
        reads_from(owner, part.parameters())


def check_whole(model: nn.Module, what: str, instead: str, error: type[VeneerError] = AttachError) -> None:
    """Raise unless every parameter of the model is whole on this device.

    what, instead  what cannot be done with a sharded model, and what can
    """
    if is_sharded_model(model):
        raise error(f"{what}: the model is sharded, and each process has a part of each weight. {instead}")


def check_attachable(model: nn.Module) -> None:
    """Raise AttachError if the model was spread over devices already: a new adapter would not be, nor synchronised.

    What ZeRO 3 has partitioned as it was made or loaded is taken over only by `deepspeed.initialize`.
    """
    if not one_of_several():
        return
    reshard(model)
    if any(map(is_dtensor, model.parameters())):
        raise AttachError(
            "An adapter cannot be attached: the model is sharded, and each process has a part of each weight. Attach "
            "the adapter to the plain model first, and shard it after that: veneer.shard(model)."
        )
    if is_run_by_deepspeed(model):
        raise AttachError(
            "An adapter cannot be attached: deepspeed.initialize has taken over the model's parameters, and would "
            "neither step nor partition new ones. Attach the adapter first; a base that deepspeed.zero.Init has "
            "partitioned already will do."
        )
    if any(isinstance(one, _DDP) for one in inwards(model)) or _is_inside_ddp(model):
        raise AttachError(
            "An adapter cannot be attached: the model is in a DistributedDataParallel, which would not average the "
            "gradients of new parameters. Attach the adapter first, and wrap the model after that."
        )
    fsdp1: Any = vars(sys.modules[_FSDP1])["FullyShardedDataParallel"] if _FSDP1 in sys.modules else ()
    if any(isinstance(module, fsdp1) for module in model.modules()):
        raise AttachError(
            "An adapter cannot be attached: the model is in a FullyShardedDataParallel, which has flattened its "
            "weights. Attach the adapter first; then veneer.shard(model) is simpler, and mixes what trains and what "
            "does not."
        )


def _is_inside_ddp(model: nn.Module) -> bool:
    """Whether some DistributedDataParallel of this process has the model, or what holds it.

    The model does not know, so all objects are looked at.
    """
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), _DDP)]
    return any(module is model for wrapper in wrappers for module in wrapper.modules())

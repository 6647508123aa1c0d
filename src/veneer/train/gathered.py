"""Whole values of what lies in shards over several devices: DTensors of FSDP2, parameters of DeepSpeed's ZeRO 3.

Only the adapters and what is trained beside them are gathered, never the base. All processes must call these together.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from veneer.layers.sharded import reshard
from veneer.model.files import read_checked
from veneer.model.overlay import DEFAULT
from veneer.model.tensors import copy_tensors

_WRAPPER = "_checkpoint_wrapped_module."  # what activation checkpointing puts into names
_OURS = ".adapters."


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter is here in part only."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def whole(tensor: Tensor) -> Tensor:
    """The whole value, in main memory, as a tensor of its own."""
    if hasattr(tensor, "ds_id"):
        import deepspeed  # type: ignore

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)
    value = tensor.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).to("cpu", copy=True)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Whole values of what is trained, by name."""
    reshard(model)
    return {name: whole(p) for name, p in _named(model.named_parameters()) if p.requires_grad}


def adapter_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Whole values of adapters and of what is trained beside them, by name; None if nothing is in shards."""
    reshard(model)
    named = [*_named(model.named_parameters()), *_named(model.named_buffers())]
    if not any(is_sharded(value) for _, value in named):
        return None
    return {name: whole(value) for name, value in named if value.requires_grad or _OURS in name}


def put_into_shards(model: nn.Module, folder: Path) -> None:
    """Give a sharded model's adapter the values in a folder; AdapterFileError if they do not fit."""
    copy_tensors(model, DEFAULT, read_checked(model, DEFAULT, folder))


def _named(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name.replace(_WRAPPER, ""), value) for name, value in pairs]

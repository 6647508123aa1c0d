"""Whole values of what is trained, in main memory, from a model that may be in shards over several devices.

Only the adapters and what is trained beside them are gathered, never the base. All processes must call these together.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.layers import sharded
from veneer.layers.sharded import is_sharded, reshard
from veneer.model.files import read_checked
from veneer.model.overlay import DEFAULT
from veneer.model.tensors import copy_tensors

_WRAPPER = "_checkpoint_wrapped_module."  # what activation checkpointing puts into names
_OURS = ".adapters."


def whole(tensor: Tensor) -> Tensor:
    """The whole value, in main memory, as a tensor of its own."""
    return sharded.whole(tensor).to("cpu", copy=True)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Whole values of what is trained, by name."""
    reshard(model)
    return {name: whole(p) for name, p in named(model.named_parameters()) if p.requires_grad}


def adapter_state(model: nn.Module, *, always: bool = False) -> dict[str, Tensor] | None:
    """Whole values of adapters and of what is trained beside them, by name; None if nothing is in shards.

    always  also if nothing is
    """
    reshard(model)
    found = [*named(model.named_parameters()), *named(model.named_buffers())]
    if not always and not any(is_sharded(value) for _, value in found):
        return None
    return {name: whole(value) for name, value in found if value.requires_grad or _OURS in name}


def put_into_shards(model: nn.Module, folder: Path) -> None:
    """Give a sharded model's adapter the values in a folder; AdapterFileError if they do not fit."""
    copy_tensors(model, DEFAULT, read_checked(model, DEFAULT, folder))


def named(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Parameters or buffers by the names that they have without activation checkpointing."""
    return [(name.replace(_WRAPPER, ""), value) for name, value in pairs]

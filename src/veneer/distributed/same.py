"""Whether the ranks have made the same model, and how they come to the same adapters."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from veneer.errors import RankError, bullet_list, shortened
from veneer.layers.attach import Adapters
from veneer.layers.saved_module import Copies
from veneer.layers.token_rows import RowsByAdapter
from veneer.layers.walk import modules_outside
from veneer.model.overlay import overlay_needed
from veneer.model.ranks import told_by_first

_SAMPLE = 256  # numbers of each weight that are compared


def check_same(model: nn.Module, ranks: list[int]) -> None:
    """Raise RankError on each rank whose adapters or base are not made as those of the first one.

    Configs, names, shapes and dtypes are compared in full, values of the base by a sample of each weight. Values of
    adapters are not: the first rank's are taken (`take_from_first`).
    """
    mine = {**_configs(model), **_looks(model)}
    first = told_by_first("comparing the model with that of the other processes", mine, ranks)
    differing = [
        f"{name}: {mine.get(name, 'not here')}, on rank {ranks[0]} {first.get(name, 'not there')}"
        for name in {**first, **mine}
        if mine.get(name) != first.get(name)
    ]
    if differing:
        raise RankError(
            bullet_list(
                f"The model of this process is not that of rank {ranks[0]}:",
                [
                    *shortened(differing),
                    "Each process must load the same base, and lay the same adapters over it: a base of random values "
                    "needs the same torch.manual_seed on all.",
                ],
            )
        )


def _configs(model: nn.Module) -> dict[str, str]:
    return {f"the config of adapter {name!r}": c.to_json() for name, c in overlay_needed(model).configs.items()}


def _looks(model: nn.Module) -> dict[str, str]:
    """What each parameter looks like, and those of the base a sample of what is in them."""
    own = {id(tensor) for tensor in adapter_values(model)}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        trains = ", trained" if parameter.requires_grad else ""
        found[name] = f"{str(parameter.dtype).removeprefix('torch.')} {list(parameter.shape)}{trains}"
        if id(parameter) not in own and not parameter.is_meta:
            found[name] += f", values {_sampled(parameter):08x}"
    return found


def _sampled(parameter: Tensor) -> int:
    """A checksum of some of the numbers of a weight."""
    flat = parameter.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().cpu()
    return zlib.crc32(some.view(torch.uint8).numpy().tobytes())


def adapter_values(model: nn.Module) -> Iterator[Tensor]:
    """What adapters have of their own, each once, and what else trains: parameters, then buffers that are saved."""
    tables = [
        child
        for _, module in modules_outside(model)
        for child in module.children()
        if isinstance(child, Adapters | Copies | RowsByAdapter)
    ]
    tensors: list[Any] = [parameter for table in tables for parameter in table.parameters()]
    tensors += [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors += [buffer for table in tables for buffer in table.buffers()]
    yield from {id(tensor): tensor for tensor in tensors}.values()


@torch.no_grad()
def take_from_first(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give the adapters of all ranks of the mesh the values that those of its first rank have."""
    device = device_of(mesh)
    for tensor in adapter_values(model):
        if not tensor.is_meta:
            value = tensor.detach().to(device).contiguous()
            from_first(value, mesh)
            tensor.copy_(value)


def from_first(value: Tensor, mesh: DeviceMesh) -> None:
    """Overwrite a tensor by that of the mesh's first rank: along one dimension of the mesh after the other."""
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist.broadcast(value, src=dist.get_global_rank(group, 0), group=group)


def device_of(mesh: DeviceMesh) -> torch.device:
    """Where this rank of a mesh computes."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())

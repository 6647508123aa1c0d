"""Spread an adapted model over several devices with FSDP2 (torch's `fully_shard`)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from veneer.distributed.blocks import Group, groups_of
from veneer.distributed.quantised import prepare_shards, why_not_shards
from veneer.distributed.same import check_same, take_from_first
from veneer.errors import AdapterNameError, AttachError, bullet_list, shortened
from veneer.layers.weights.offloaded import offloading_hook
from veneer.model.overlay import adapted_part, overlay_needed
from veneer.model.ranks import all_ranks
from veneer.model.sharded import is_sharded_model
from veneer.model.wrapped import inwards


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool | int | None = None,
    mp_policy: Any = None,
    offload_policy: Any = None,
) -> nn.Module:
    """Spread a model with adapters over the devices of a mesh, in place; returns the same model.

        model = veneer.get_peft_model(base, config)
        veneer.shard(model)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Each block is gathered for its own forward and backward (`fully_shard`), so a rank holds its share of base and
    adapters, and one block. Gradients are means over the ranks, each of which has rows of its own. Make the optimizer
    afterwards: the parameters are others. All ranks of the mesh must call it, each with the same base; the adapters
    become those of the first rank. A model on the meta device stays there until `veneer.distributed.load_base`.

    mesh                   of one dimension, or two: copies, shards of each. None: all ranks, on their accelerators, or
                           on CPUs if the process group is one of gloo alone
    reshard_after_forward, mp_policy, offload_policy   as of `torch.distributed.fsdp.fully_shard`

    Raises AttachError that lists every reason against it, or RankError if another rank has one or another model; and
    then nothing has changed.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise AttachError(
            "There is no process group to spread the model over. Start the program with torchrun "
            "(`torchrun --nproc-per-node 2 program.py`), and call torch.distributed.init_process_group() first."
        )
    ranks = None if mesh is None else mesh.mesh.flatten().tolist()
    with all_ranks("planning how to shard the model", ranks):
        part, groups = _planned(model)
    mesh = mesh or init_device_mesh(_device_type(), (dist.get_world_size(),))
    ranks = mesh.mesh.flatten().tolist()
    with all_ranks("comparing the models of all processes", ranks):
        check_same(part, ranks)
    take_from_first(part, mesh)
    prepare_shards(part)
    options = {
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": mp_policy,
        "offload_policy": offload_policy,
    }
    _carry_out(groups, mesh, {key: value for key, value in options.items() if value is not None})
    return model


def _carry_out(groups: list[Group], mesh: DeviceMesh, options: dict[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    for group in groups:
        fully_shard(group.modules if len(group.modules) > 1 else group.modules[0], mesh=mesh, **options)


def _device_type() -> str:
    """Where the ranks compute: what their process group serves besides the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    gloo_alone = dist.get_backend() == "gloo"
    return "cpu" if accelerator is None or gloo_alone else accelerator.type


def _planned(model: nn.Module) -> tuple[nn.Module, list[Group]]:
    """The part that has the adapters, and what of it is gathered together. Raises AttachError."""
    if any(isinstance(one, nn.parallel.DistributedDataParallel | nn.DataParallel) for one in inwards(model)):
        raise AttachError("The model is in a DistributedDataParallel already. Shard the plain model instead.")
    try:
        part = adapted_part(model)
    except AdapterNameError as error:
        raise AttachError(
            f"Nothing was sharded: {error} An adapter that comes later would be on one device only, so attach it "
            "first: get_peft_model(model, config), then shard(model)."
        ) from None
    if is_sharded_model(part):
        raise AttachError("The model is sharded already.")
    if problems := [*_unready(part), *why_not_shards(part)]:
        raise AttachError(bullet_list("The model cannot be sharded:", shortened(problems)))
    return part, groups_of(part)


def _unready(part: nn.Module) -> list[str]:
    overlay = overlay_needed(part)
    problems = []
    if overlay.route.in_weights:
        problems.append(f"adapter {', '.join(overlay.route.in_weights)} is merged: call unmerge_adapter() first")
    problems += [
        f"adapter {name!r} waits for its data (init_lora_weights='eva'): call initialize_lora_eva_weights first"
        for name in sorted(overlay.waiting)
    ]
    offloaded = [path or type(part).__name__ for path, m in part.named_modules() if offloading_hook(m) is not None]
    if offloaded:
        problems.append(
            f"{offloaded[0]} and {len(offloaded) - 1} more are offloaded by accelerate: load the base without "
            "device_map"
        )
    meta = [name for name, parameter in part.named_parameters() if parameter.is_meta]
    real = [name for name, parameter in part.named_parameters() if not parameter.is_meta]
    if meta and real:
        problems.append(f"{meta[0]} is on the meta device and {real[0]} is not: load all of the base, or nothing of it")
    return problems

"""Give values to a model that was made, adapted and sharded on the meta device: no rank ever holds the whole base.

Each rank reads its own rows of each weight from the safetensors files, and no more. Adapters start as they would have
on a loaded base; what DoRA and trained embeddings need of the base is gathered one layer at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from veneer.distributed.same import device_of, from_first
from veneer.errors import AdapterFileError, AttachError, bullet_list, shortened
from veneer.layers.adapter import Adapter
from veneer.layers.attach import Adapters
from veneer.layers.kinds import Layer
from veneer.layers.saved_module import Copies
from veneer.layers.sharded import is_sharded, local, put, rows_here, whole
from veneer.layers.token_rows import RowsByAdapter
from veneer.layers.walk import modules_outside
from veneer.model.make import new_adapter
from veneer.model.overlay import adapted_part, adapters_by_site, overlay_needed, saved_modules, token_rows
from veneer.model.sharded import on_all_ranks
from veneer.storage.checkpoint import Checkpoint, open_checkpoint

_OURS = (Adapters, Copies, RowsByAdapter)


@dataclass(frozen=True)
class _Slot:
    """A weight of the base: where it is in the model, and its name in the files."""

    module: nn.Module
    name: str
    in_file: str


def load_base(model: nn.Module, location: str | Path, *, generator: Generator | None = None) -> nn.Module:
    """Load the base of a model that was sharded on the meta device, and let its new adapters start; returns the model.

        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
        model = veneer.get_peft_model(base, veneer.LoraConfig(r=16))
        veneer.shard(model)
        load_base(model, "folder-of-the-base")

    location   a folder with `model.safetensors` or shards with an index, which all ranks can read
    generator  where the random numbers of the first rank come from, which all ranks use

    Files must have the model's own names, as `save_pretrained` of the same architecture writes them. For an adapter
    that was saved, call `model.load_adapter(folder, name)` next, which gives it the saved values.

    Raises AttachError if the model is not sharded or not on the meta device, AdapterFileError that lists what the files
    lack, or RankError; and then nothing has changed.
    """
    part = adapted_part(model)
    with on_all_ranks(part, "looking at the files of the base"):
        mesh = _mesh_of(part)
        checkpoint = open_checkpoint(location)
        slots = _slots(part, checkpoint)
        buffers = _buffers_to_compute(part, checkpoint)
    device = device_of(mesh)
    _allocate(part, device)
    with on_all_ranks(part, "reading the base"), torch.no_grad():
        for slot in slots:
            _fill(slot, checkpoint)
        for owner in buffers:
            compute: Any = part
            compute._init_weights(owner)
    for name in overlay_needed(part).configs:
        _start(part, name, mesh, generator)
    return model


def _mesh_of(part: nn.Module) -> DeviceMesh:
    parameters: list[Any] = list(part.parameters())
    mesh = next((p.device_mesh for p in parameters if is_sharded(p)), None)
    if mesh is None:
        raise AttachError("The model is not sharded: call veneer.shard(model) first, while it is on the meta device.")
    if real := [name for name, parameter in part.named_parameters() if not parameter.is_meta]:
        raise AttachError(
            f"The model has values already ({real[0]} and {len(real) - 1} more), which would be overwritten. Make it "
            'within `with torch.device("meta"):`.'
        )
    return mesh


def _slots(part: nn.Module, checkpoint: Checkpoint) -> list[_Slot]:
    """The weights of the base, each once, and its persistent buffers. Raises AdapterFileError."""
    slots: list[_Slot] = []
    done: set[int] = set()
    missing, wrong = [], []
    held = list(_held(part))
    known = {id(tensor) for path, _, name, tensor in held if _in_file(f"{path}{name}", part, checkpoint)}
    for path, module, name, tensor in held:
        in_file = _in_file(f"{path}{name}", part, checkpoint)
        if id(tensor) in done or (in_file is None and id(tensor) in known):  # tied: in the files once
            continue
        done.add(id(tensor))
        if in_file is None:
            missing.append(f"missing      {path}{name} {list(tensor.shape)}")
        elif checkpoint.tensors[in_file].shape != tuple(tensor.shape):
            shape = list(checkpoint.tensors[in_file].shape)
            wrong.append(f"wrong shape  {path}{name} {shape}, the model needs {list(tensor.shape)}")
        else:
            slots.append(_Slot(module, name, in_file))
    if problems := [*shortened(missing), *shortened(wrong)]:
        raise AdapterFileError(
            bullet_list(
                f"{checkpoint.location} does not hold this base:",
                [
                    *problems,
                    "If the files have older names, save the base once as this version of its library writes it: "
                    "from_pretrained(…), then save_pretrained(…).",
                ],
            )
        )
    return slots


def _held(part: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path with a dot, module, name, tensor) of what a checkpoint of the base holds."""
    for path, module in modules_outside(part, _OURS):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix, module, name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix, module, name, buffer


def _in_file(name: str, part: nn.Module, checkpoint: Checkpoint) -> str | None:
    """The name of a weight in the files: its own, or without or with what a head model calls its body."""
    prefix = f"{getattr(part, 'base_model_prefix', '')}."
    for one in (name, name.removeprefix(prefix), prefix + name):
        if one in checkpoint.tensors:
            return one
    return None


def _buffers_to_compute(part: nn.Module, checkpoint: Checkpoint) -> list[nn.Module]:
    """Modules with buffers that no file holds and transformers computes, as a rotary embedding's frequencies.

    Raises AttachError if there are others.
    """
    owners, unknown = [], []
    for path, module in modules_outside(part, _OURS):
        names = [name for name in module._non_persistent_buffers_set if _is_meta(module._buffers[name])]
        if not names:
            continue
        if hasattr(part, "_init_weights") and not module._parameters:
            owners.append(module)
        else:
            unknown += [f"{path}.{name}" for name in names]
    if unknown:
        raise AttachError(
            bullet_list(
                "These buffers have no values, and no file holds them:",
                [
                    *shortened(unknown),
                    "Make the model such that only its parameters are on the meta device, for example within "
                    "`with accelerate.init_empty_weights():`.",
                ],
            )
        )
    return owners


def _is_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def _allocate(part: nn.Module, device: torch.device) -> None:
    """Give every tensor that is on the meta device memory: of a shard, that of this rank."""
    for module in part.modules():
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t, recurse=False)


def _fill(slot: _Slot, checkpoint: Checkpoint) -> None:
    target = slot.module._parameters.get(slot.name)
    target = slot.module._buffers[slot.name] if target is None else target
    mine = local(target).detach()
    if mine.numel() and is_sharded(target):
        mine.copy_(checkpoint.read_rows(slot.in_file, rows_here(target)))
    elif mine.numel():
        mine.copy_(checkpoint.read(slot.in_file))


@torch.no_grad()
def _start(part: nn.Module, name: str, mesh: DeviceMesh, generator: Generator | None) -> None:
    """Let an adapter start, on every rank as on the first. Collective."""
    overlay = overlay_needed(part)
    config = overlay.configs[name]
    for site, adapter in adapters_by_site(part, name):
        if site.tied_to is not None:
            continue
        layer: Layer = part.get_submodule(site.path)
        with _gathered(layer, site.parameter, needed=site.dora):
            made = new_adapter(layer, site, config, generator=generator).adapter
        _take_over(adapter, made, mesh)
    for _, module in saved_modules(part, name):
        copy = module.modules_to_save[name].state_dict(keep_vars=True)
        for inner, value in copy.items():
            local(value).detach().copy_(local(_original(module, inner)))
    for site, rows in token_rows(part, name):
        W = whole(part.get_submodule(site.path).get_parameter("weight"))
        rows.number(site.tokens, W.device)
        put(rows.trainable_tokens_delta, W[rows.tokens])


def _take_over(adapter: Adapter, made: Adapter, mesh: DeviceMesh) -> None:
    values = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    own = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
    for name, value in values.items():
        value = value.detach().contiguous()
        from_first(value, mesh)
        put(own[name], value)


def _original(module: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


@contextmanager
def _gathered(layer: Layer, parameter: str, *, needed: bool) -> Iterator[None]:
    """Within the block the layer has its whole weight, if it is needed."""
    shard = layer._parameters[parameter]
    if needed:
        layer._parameters[parameter] = nn.Parameter(whole(shard), requires_grad=False)
    try:
        yield
    finally:
        layer._parameters[parameter] = shard

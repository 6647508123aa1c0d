"""Weights that accelerate keeps elsewhere (`device_map` with "cpu" or "disk", `cpu_offload`, `disk_offload`).

Between calls the layer's parameter is on the meta device; the layer's hook has a map of the values, and the device
that they are brought to for each call. Nothing of a map is ever overwritten, which may be a checkpoint or serve several
layers: a new value is laid over it, so that the old one can come back.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.layers.kinds import Layer
from veneer.layers.weights.dense import DTYPES
from veneer.layers.weights.store import Store

Hook = Any  # accelerate's AlignDevicesHook, which is not imported here


def _hooks(hook: Hook) -> Iterator[Hook]:
    """The hook, or those that a SequentialHook runs one after the other."""
    if type(hook).__name__ == "SequentialHook":
        for one in hook.hooks:
            yield from _hooks(one)
    else:
        yield hook


def _offloading_hooks(module: nn.Module) -> list[Hook]:
    """Those that bring this module's own tensors in for each call, where it was dispatched more than once."""
    return [
        hook
        for hook in _hooks(vars(module).get("_hf_hook"))
        if type(hook).__name__ == "AlignDevicesHook" and hook.offload and hook.weights_map is not None
    ]


def offloading_hook(module: nn.Module) -> Hook | None:
    """The hook that brings this module's own tensors in for each call; None if it has none."""
    found = _offloading_hooks(module)
    return found[-1] if found else None  # of several the last is what a call sees


def is_offloaded(layer: Layer, parameter: str = "weight") -> bool:
    """Whether accelerate keeps the parameter elsewhere and brings it in for each call."""
    value = layer._parameters.get(parameter)
    return value is not None and value.is_meta and offloading_hook(layer) is not None


def brings_in_submodules(module: nn.Module) -> bool:
    """Whether a hook brings in all that is inside a module at once, as `preload_module_classes` asks for."""
    hook = offloading_hook(module)
    return hook is not None and hook.place_submodules


def execution_device(layer: Layer) -> torch.device:
    """The device on which an offloaded layer computes."""
    hook = offloading_hook(layer)
    assert hook is not None
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def settle(module: nn.Module) -> None:
    """Bring in for good what is offloaded inside a module, and let the hooks go that did so for each call.

    Parameters stay the objects they are, which an optimizer may hold.
    """
    for part in module.modules():
        if offloading_hook(part) is not None:
            _bring_back(part)
            let_go(part)


def _bring_back(module: nn.Module) -> None:
    for name, value in real_values(module):
        if name in module._buffers:
            module._buffers[name] = value
        else:
            there = module._parameters[name]
            assert there is not None
            torch.utils.swap_tensors(there, nn.Parameter(value, there.requires_grad))


def real_values(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, value) of a module's own tensors that are offloaded, where it computes."""
    if (hook := offloading_hook(module)) is None:
        return []
    own = [*module._parameters.items(), *module._buffers.items()]
    device = execution_device(module)
    return [
        (name, hook.weights_map[name].detach().to(device, there.dtype))
        for name, there in own
        if there is not None and there.is_meta
    ]


def let_go(module: nn.Module) -> None:
    """Take the hooks off a module that needs none any more: off a copy, they would bring in the original's values."""
    for name in ("_hf_hook", "_old_forward", "forward"):
        vars(module).pop(name, None)


class Replaced(Mapping[str, Tensor]):
    """A map of weights with other values for some names."""

    def __init__(self, base: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        self.base, self.values_by_name = base, dict(values)

    @classmethod
    def over(cls, base: Mapping[str, Tensor], name: str, value: Tensor) -> "Replaced":
        """A map with one more value of its own."""
        if isinstance(base, Replaced):
            return cls(base.base, {**base.values_by_name, name: value})
        return cls(base, {name: value})

    def without(self, name: str) -> Mapping[str, Tensor]:
        """The map with the old value of this name."""
        left = {key: value for key, value in self.values_by_name.items() if key != name}
        return Replaced(self.base, left) if left else self.base

    def __getitem__(self, name: str) -> Tensor:
        return self.values_by_name[name] if name in self.values_by_name else self.base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


@dataclass(frozen=True)
class Elsewhere:
    """A value of a map, to be read when it is needed."""

    weights: Mapping[str, Tensor]
    name: str

    def read(self) -> Tensor:
        """The value, on the device where the map keeps it."""
        return self.weights[self.name]


def elsewhere(layer: Layer, parameter: str) -> Elsewhere:
    """Where the value of an offloaded parameter is, also after another was written."""
    hook = offloading_hook(layer)
    assert hook is not None
    weights = hook.weights_map
    if isinstance(weights, Replaced) and parameter not in weights.values_by_name:
        weights = weights.base
    return Elsewhere(weights, parameter)


def put_back(layer: Layer, parameter: str, original: Elsewhere) -> None:
    """Let an offloaded parameter have the value again that it had before `write`."""
    for hook in _offloading_hooks(layer):
        weights = hook.weights_map
        if not isinstance(weights, Replaced) or parameter not in weights.values_by_name:  # it was dispatched anew since
            _write(layer, parameter, original.read())
            return
        hook.weights_map = weights.without(parameter)


def _holds(layer: Layer, parameter: str) -> bool:
    weight = layer._parameters.get(parameter)
    return type(weight) is nn.Parameter and weight.dtype in DTYPES and is_offloaded(layer, parameter)


def _read(layer: Layer, parameter: str) -> Tensor:
    hook = offloading_hook(layer)
    assert hook is not None
    # a checkpoint may hold another dtype than the model was loaded in
    return hook.weights_map[parameter].detach().to(execution_device(layer), layer._parameters[parameter].dtype)


def _write(layer: Layer, parameter: str, W: Tensor) -> None:
    hooks = _offloading_hooks(layer)
    value, folder = W.detach().to("cpu", layer._parameters[parameter].dtype), _folder(hooks[-1].weights_map, parameter)
    value = value if folder is None else _on_disk(value, folder)
    for hook in hooks:  # the first one's is what the layer gets when the hooks are removed
        hook.weights_map = Replaced.over(hook.weights_map, parameter, value)


def _folder(weights: Mapping[str, Tensor], name: str) -> str | None:
    """The folder for values that are on disk, None if this one is in memory."""
    weights = weights.base if isinstance(weights, Replaced) else weights
    prefix = ""
    if type(weights).__name__ == "PrefixedDataset":
        source: Any = weights
        weights, prefix = source.dataset, source.prefix
    if type(weights).__name__ != "OffloadedWeightsLoader":
        return None
    loader: Any = weights
    in_memory = f"{prefix}{name}" in loader.state_dict
    return None if in_memory else str(loader.save_folder or tempfile.gettempdir())


def _on_disk(value: Tensor, folder: str) -> Tensor:
    """The value as a tensor whose memory is a file, which is gone with the tensor."""
    descriptor, file = tempfile.mkstemp(suffix=".dat", prefix="veneer-", dir=folder)
    os.close(descriptor)
    mapped = torch.from_file(file, shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
    mapped.copy_(value)
    with suppress(PermissionError):  # Windows keeps a file that is mapped
        os.unlink(file)
    return mapped


OFFLOADED = Store("offloaded", _holds, _read, _write)


class _NoHook:
    """What a resident has in place of accelerate's hook: nothing is moved, neither it nor its inputs."""

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Nothing to prepare."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as they are: accelerate would move the layer that an adapter is given."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """The output as it is."""
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Nothing to undo."""
        return module


class Resident(nn.Module):
    """A module that stays where it computes when accelerate offloads the model it is part of.

    Adapters are small, and an optimizer must find the parameters that a backward pass reaches: those that a hook
    brings in for a call are others each time. Their layer's own hook sees to the inputs.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_hf_hook":
            super().__setattr__(name, value)
            return
        vars(self)[name] = value
        _bring_back(self)
        vars(self)[name] = _NoHook()

"""`layer_replication`: a deeper model built from stretches of its own layers, which share their weights.

Where a layer comes a second time, a replica stands: another module with the same parameters, so that each gets its
own adapter. Nothing is copied but structure, and the original stack is kept aside to be put back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from veneer.errors import AttachError, TargetError
from veneer.layers.walk import modules_outside
from veneer.layers.weights.offloaded import offloading_hook

_MARK = "_veneer_replication"
_COUNT = "num_hidden_layers"
# lists in a transformers config that have an entry for each layer
_BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types")

Stretches = Sequence[tuple[int, int]]


class Replication:
    """A model's stack of layers in two versions, of which one is in place.

    stretches   the (start, end) that the longer stack is made of
    path        where the stack is in the model
    original    the layers the model came with
    replicated  those stretches of them
    """

    def __init__(self, model: nn.Module, stretches: Stretches) -> None:
        """Build the longer stack. Not in place yet. Raises TargetError if there is no one stack, or it is shorter."""
        self.stretches = [(start, end) for start, end in stretches]
        self.path = main_stack(model)
        self.original = _stack_at(model, self.path)
        beyond = [stretch for stretch in self.stretches if stretch[1] > len(self.original)]
        if beyond:
            raise TargetError(
                f"layer_replication: {', '.join(map(str, beyond))} goes beyond the {len(self.original)} layers of "
                f"{self.path}; a stretch (start, end) holds the layers start to end - 1."
            )
        order = [index for start, end in self.stretches for index in range(start, end)]
        layers, seen = [], set()
        for index in order:
            layer = self.original[index]
            layers.append(_replica(layer) if index in seen else layer)
            seen.add(index)
        self.replicated = nn.ModuleList(layers)
        self.replicated.training = self.original.training
        vars(self.replicated)[_MARK] = self
        self._spare = [layer for index, layer in enumerate(self.original) if index not in seen]
        self._config = _config_of(model, self.path, len(self.original))
        self._settings = _settings(self._config, order)
        self._numbers: list[tuple[nn.Module, int]] = []
        self._kept = False

    def put(self, model: nn.Module) -> None:
        """Put the longer stack in place, and tell the layers and the config of it."""
        self._numbers = []
        for index, layer in enumerate(self.replicated):
            for module in layer.modules():
                number = vars(module).get("layer_idx")
                if type(number) is int:
                    self._numbers.append((module, number))
                    vars(module)["layer_idx"] = index
        _replace(model, self.original, self.replicated)
        self._exchange_settings()

    def take_back(self, model: nn.Module) -> None:
        """Put the original stack in place, with everything as it was."""
        _replace(model, self.replicated, self.original)
        self._exchange_settings()
        for module, number in reversed(self._numbers):
            vars(module)["layer_idx"] = number
        self._catch_up()

    def keep(self) -> None:
        """Let the longer stack stay after `replicated`."""
        self._kept = True

    def settle(self) -> None:
        """Make the longer stack the model's own for good, each layer with weights of its own."""
        vars(self.replicated).pop(_MARK)
        taken: set[int] = set()
        for layer in self.replicated:
            mine: dict[int, Any] = {}
            for module in layer.modules():
                for table in (module._parameters, module._buffers):
                    for name, value in table.items():
                        if value is not None and id(value) in taken:
                            table[name] = mine.setdefault(id(value), _copied(value))
            taken |= {id(value) for value in [*layer.parameters(), *layer.buffers()]}

    @property
    def kept(self) -> bool:
        """Whether it stays."""
        return self._kept

    def _exchange_settings(self) -> None:
        """Give the config the values it does not have at the moment."""
        for name, value in self._settings.items():
            self._settings[name] = getattr(self._config, name)
            setattr(self._config, name, value)

    def _catch_up(self) -> None:
        """Move layers that were out of place to where the model is now, into its mode, and freeze them like it."""
        if not self._spare or not len(self.replicated):
            return
        there = dict(self.replicated[0].named_parameters()) | dict(self.replicated[0].named_buffers())
        for layer in self._spare:
            layer.train(self.replicated.training)
            for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                if name in there:
                    tensor.data = tensor.data.to(there[name].device, there[name].dtype)
                    tensor.requires_grad_(there[name].requires_grad)


class _NoReplication:
    """In place of one where nothing is replicated."""

    def keep(self) -> None:
        """Nothing to keep."""


@contextmanager
def replicated(model: nn.Module, stretches: Stretches | None) -> Iterator[Replication | _NoReplication]:
    """Within the block the model's layers are these stretches of them; afterwards too if `keep` was called.

    Raises TargetError as `Replication` does, AttachError if the model's layers are other stretches already.
    """
    if not stretches:
        yield _NoReplication()
        return
    there = replication_of(model)
    if there is not None:
        if there.stretches != [tuple(stretch) for stretch in stretches]:
            raise AttachError(
                f"layer_replication={list(stretches)}: the model's layers are {there.stretches} already, for an "
                "adapter that is on it. Leave it out, or remove that adapter first."
            )
        yield _NoReplication()
        return
    stack = Replication(model, stretches)
    stack.put(model)
    try:
        yield stack
    finally:
        if not stack.kept:
            stack.take_back(model)


@contextmanager
def original_layers(model: nn.Module) -> Iterator[None]:
    """Within the block the model has the layers it came with."""
    stack = replication_of(model)
    if stack is None:
        yield
        return
    stack.take_back(model)
    try:
        yield
    finally:
        stack.put(model)


def replication_of(model: nn.Module) -> Replication | None:
    """The replication that is in place, or None."""
    found = (vars(module).get(_MARK) for _, module in modules_outside(model) if isinstance(module, nn.ModuleList))
    return next((stack for stack in found if stack is not None), None)


def main_stack(model: nn.Module) -> str:
    """The path of the model's layers: its longest list of blocks that is not part of another's entry.

    Raises TargetError if there is none, or two are equally long.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and path}
    outer = {path: module for path, module in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    blocks = {path: module for path, module in outer.items() if all(list(entry.children()) for entry in module)}
    lengths = {path: len(module) for path, module in (blocks or outer).items() if len(module)}
    longest = max(lengths.values(), default=0)
    paths = [path for path, length in lengths.items() if length == longest]
    if len(paths) == 1:
        return paths[0]
    if not paths:
        raise TargetError("layer_replication: the model has no list of layers (an nn.ModuleList) to replicate.")
    raise TargetError(
        f"layer_replication: which layers are meant cannot be told, {' and '.join(paths)} have {longest} each. Give "
        "the part of the model that has only one of them."
    )


def _stack_at(model: nn.Module, path: str) -> nn.ModuleList:
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    return stack


def _replica(layer: nn.Module) -> nn.Module:
    """Another module with the same parameters, buffers and configs, and the same values where they are offloaded."""
    shared: list[Any] = [*layer.parameters(), *layer.buffers()]
    shared += [hook.weights_map for module in layer.modules() if (hook := offloading_hook(module)) is not None]
    shared += [config for module in layer.modules() if (config := vars(module).get("config")) is not None]
    return deepcopy(layer, {id(one): one for one in shared})


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _config_of(model: nn.Module, path: str, count: int) -> Any:
    """The config that counts the layers: that of the nearest module around the stack that has one."""
    while path:
        path = path.rpartition(".")[0]
        config = vars(model.get_submodule(path)).get("config")
        if config is not None and getattr(config, _COUNT, None) == count:
            return config
    return None


def _settings(config: Any, order: list[int]) -> dict[str, Any]:
    """What the config says of the longer stack."""
    if config is None:
        return {}
    count = getattr(config, _COUNT)
    settings: dict[str, Any] = {_COUNT: len(order)}
    for name in _BY_LAYER:
        entries = getattr(config, name, None)
        if isinstance(entries, list | tuple) and len(entries) == count:
            settings[name] = type(entries)(entries[index] for index in order)
    return settings


def _copied(value: torch.Tensor) -> torch.Tensor:
    copy = value.detach().clone()
    return nn.Parameter(copy, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else copy

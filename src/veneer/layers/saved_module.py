"""Modules trained in full beside the adapters (`modules_to_save`): each adapter owns a copy, the original stays.

The module's class is swapped as for an adapted layer; its forward hands over to the copy of the last acting adapter
that has one.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any

from torch import nn

from veneer.layers.attach import Adapted, check_forward, rebind_hook
from veneer.layers.kinds import Layer
from veneer.layers.route import Route


class Copies(nn.ModuleDict):
    """One full copy of a module for each adapter that trains it, by adapter name."""


class Saved(nn.Module):
    """Placed in front of a module's class: its own forward, or that of the copy that acts."""

    modules_to_save: Copies
    route: Route

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the copy that acts, or of the module itself."""
        for name in reversed(self.route.acting):
            if name in self.modules_to_save:
                return self.modules_to_save[name](*args, **kwargs)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (_base_class(self),), self.__dict__


@cache
def _saved_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Saved{base.__name__}", (Saved, base), {"__module__": __name__, "__doc__": base.__doc__})


def _base_class(module: Any) -> type[nn.Module]:
    mro = type(module).__mro__
    return mro[mro.index(Saved) + 1]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _saved_class(base)
    return cls.__new__(cls)


def original_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The module's own parameters by name, without those of the copies."""
    for name, parameter in module.named_parameters():
        if not name.startswith("modules_to_save."):
            yield name, parameter


def keep_copy(module: Layer, name: str, route: Route) -> nn.Module:
    """Give adapter `name` its own trainable copy of the module; returns the copy."""
    if isinstance(module, Saved):
        others, module.modules_to_save = module.modules_to_save, Copies()
        try:
            copy = _plain_copy(module)
        finally:
            module.modules_to_save = others
    else:
        check_forward(module)
        copy = deepcopy(module)
        module.__class__ = _saved_class(type(module))
        module.modules_to_save = Copies()
        module.route = route
        rebind_hook(module)
    copy.requires_grad_(True)
    module.modules_to_save[name] = copy
    return copy


def _plain_copy(module: Layer) -> nn.Module:
    route, module.route = module.route, Route()
    try:
        copy = deepcopy(module)
    finally:
        module.route = route
    _strip(copy)
    return copy


def drop_copy(module: Layer, name: str) -> None:
    """Forget adapter `name`'s copy. With the last one the module is what it was before."""
    if not isinstance(module, Saved) or name not in module.modules_to_save:
        return
    del module.modules_to_save[name]
    if not len(module.modules_to_save):
        _strip(module)


def _strip(module: Layer) -> None:
    base = _base_class(module)
    del module.modules_to_save
    del module.route
    module.__class__ = base
    rebind_hook(module)


def contains_adapted(module: nn.Module) -> bool:
    """Whether the module is, or holds, a layer that another adapter adapts."""
    return any(isinstance(child, Adapted) for child in module.modules())

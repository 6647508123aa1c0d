"""Lay adapters over one layer, and take them off.

The layer's class is swapped (see swap.py) and the adapters become a child called `adapters`. The layer keeps its
place, its parameters and their names.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.errors import ArgumentError, MergeError
from veneer.layers import swap
from veneer.layers.adapter import Adapter, checked_factor
from veneer.layers.by_rows import serve_rows
from veneer.layers.kinds import Layer
from veneer.layers.route import Part, Route

CHILD = "adapters"


class Adapters(nn.ModuleDict):
    """The adapters of one layer, by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Adapter: ...


class Adapted(swap.Front):
    """Placed in front of any layer class: its output, then each adapter that acts."""

    word = "Lora"
    by_rows = True
    adapters: Adapters
    _veneer_route: Route

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the adapters of the route's plan added in order."""
        y = super().forward(*args, **kwargs)
        steps = [(step.name, step.part) for step in self._veneer_route.plan if step.name in self.adapters]
        if not steps:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        if len(steps) > 1:
            rows = [(self.adapters[name], part) for name, part in steps if part is not None and part.rows is not None]
            if len(rows) == len(steps):
                return serve_rows(rows, x, y, self)
        for name, part in steps:
            y = self._add(self.adapters[name], part, x, y)
        return y

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter's update by `scale` times its trained factor; nothing if the layer has no such adapter.

        Raises ArgumentError, or MergeError while an adapter is merged, as do the two below.
        """
        factor = self._checked(scale)
        if adapter in self.adapters:
            self.adapters[adapter].rescale(factor * self.adapters[adapter].trained_scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of the active adapters by `scale`."""
        factor = self._checked(scale)
        for adapter in self._active():
            adapter.rescale(float(adapter.scale) * factor)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of the active adapters by `scale`; None gives them the trained ones back."""
        factor = self._checked(1.0 if scale is None else scale)
        if factor == 0:
            raise ArgumentError("A scale cannot be divided by 0.")
        for adapter in self._active():
            adapter.rescale(adapter.trained_scale if scale is None else float(adapter.scale) / factor)

    def _active(self) -> list[Adapter]:
        return [self.adapters[name] for name in self._veneer_route.active if name in self.adapters]

    def _checked(self, scale: float) -> float:
        if self._veneer_route.merged:
            raise MergeError("The scale is part of the merged weights: call unmerge_adapter() first.")
        return checked_factor(scale)

    def _add(self, adapter: Adapter, part: Part | None, x: Tensor, y: Tensor) -> Tensor:
        if part is None:
            return adapter(x, y, self)
        return part.through(lambda x, y: adapter(x, y, self), x, y)


def attach(layer: Layer, name: str, adapter: Adapter, route: Route) -> None:
    """Add an adapter to a layer, which becomes an adapted layer with the first one.

    Raises AttachError if something other than accelerate has replaced the layer's forward.
    """
    if not isinstance(layer, Adapted):
        swap.lay_over(layer, Adapted, CHILD, Adapters(), route)
    adapters: Any = layer.adapters
    adapters[name] = adapter.train(layer.training)


def adapter_on(layer: Layer, name: str, parameter: str = "weight") -> Adapter:
    """Adapter `name` on this weight of the layer."""
    found = layer.adapters[name]
    return found if isinstance(found, Adapter) else getattr(found, parameter)


def detach(layer: Layer, name: str) -> None:
    """Take an adapter away. With the last one the layer is what it was before."""
    if isinstance(layer, Adapted):
        swap.forget(layer, CHILD, name)

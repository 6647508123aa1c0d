"""Lay adapters over one layer, and take them off.

The layer's class is swapped (see swap.py) and the adapters become a child called `adapters`. The layer keeps its
place, its parameters and their names.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.layers import swap
from veneer.layers.adapter import Adapter
from veneer.layers.adapter_names import AdapterNames
from veneer.layers.by_rows import serve_rows, serves_rows
from veneer.layers.fast_path import takes_fast_path
from veneer.layers.kinds import Layer
from veneer.layers.merging import merged_values
from veneer.layers.part import Part
from veneer.layers.route import Route

CHILD = "adapters"


class Adapters(nn.ModuleDict):
    """The adapters of one layer, by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Adapter: ...


class Adapted(AdapterNames, swap.Front):
    """Placed in front of any layer class: its output, then each adapter that acts."""

    word = "Lora"
    by_rows = True
    _veneer_child = CHILD
    adapters: Adapters
    _veneer_route: Route

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the adapters of the route's plan added in order."""
        plan = self._veneer_route.plan
        if serves_rows(plan) and self._veneer_merged is None:
            y = super().forward(*args, **kwargs)
            return serve_rows(plan, args[0] if args else next(iter(kwargs.values())), y, self)
        steps = [(step.name, step.part) for step in plan if step.name in self.adapters]
        if not steps or self._veneer_merged is not None:
            return super().forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if len(steps) == 1 and steps[0][1] is None and takes_fast_path(self, self.adapters[steps[0][0]], x):
            return self.adapters[steps[0][0]](x, None, self)
        y = super().forward(*args, **kwargs)
        for name, part in steps:
            y = _add(self.adapters[name], part, x, y, self)
        return y

    def _veneer_merged_with(self, names: Sequence[str], originals: dict[str, Tensor]) -> dict[str, Tensor]:
        adapters, what = [self.adapters[name] for name in names], f"This {swap.base_class(self).__name__}"
        return merged_values(self, "weight", adapters, what, originals.get("weight"))


def _add(adapter: Adapter, part: Part | None, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
    if part is None:
        return adapter(x, y, layer)
    return part.through(lambda x, y: adapter(x, y, layer), x, y)


def attach(layer: Layer, name: str, adapter: Adapter, route: Route) -> None:
    """Add an adapter to a layer, which becomes an adapted layer with the first one.

    Raises AttachError if something other than accelerate has replaced the layer's forward.
    """
    if not isinstance(layer, Adapted):
        swap.lay_over(layer, Adapted, CHILD, Adapters(), route)
    table: Any = layer._modules[CHILD]
    table._modules[name] = adapter if adapter.training == layer.training else adapter.train(layer.training)
    route.may_train.add(name)


def adapter_on(layer: Layer, name: str, parameter: str = "weight") -> Adapter:
    """Adapter `name` on this weight of the layer."""
    found = layer._modules[CHILD][name]
    return found if isinstance(found, Adapter) else getattr(found, parameter)


def detach(layer: Layer, name: str) -> None:
    """Take an adapter away. With the last one the layer is what it was before."""
    if isinstance(layer, Adapted):
        swap.forget(layer, CHILD, name)

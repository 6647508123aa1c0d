"""Change what a layer is, and change it back.

Attaching swaps the layer's class for one made on the fly in front of it, `class LoraLinear(Adapted, Linear)`, and
registers the adapters as a child. The layer keeps its place, its parameters and their names.
"""

from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.errors import AttachError
from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer
from veneer.layers.route import Route


class Adapters(nn.ModuleDict):
    """The adapters of one layer, by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Adapter: ...


class Adapted(nn.Module):
    """Placed in front of any layer class: its output, then each adapter that acts."""

    adapters: Adapters
    route: Route

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the adapters of the route's plan added in order."""
        y = super().forward(*args, **kwargs)
        for name in self.route.plan:
            if name in self.adapters:
                x = args[0] if args else next(iter(kwargs.values()))
                y = self.adapters[name](x, y, self)
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A class made on the fly has no importable name: rebuild it from its base.
        return _rebuild, (base_class(self),), self.__dict__


@cache
def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """`class Lora<Base>(Adapted, Base)`, the same object each time."""
    return type(f"Lora{base.__name__}", (Adapted, base), {"__module__": __name__, "__doc__": base.__doc__})


def base_class(layer: Any) -> type[nn.Module]:
    """The class the layer had before it was adapted; its own if it is not adapted."""
    mro = type(layer).__mro__
    return mro[mro.index(Adapted) + 1] if Adapted in mro else type(layer)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base)
    return cls.__new__(cls)


def attach(layer: Layer, name: str, adapter: Adapter, route: Route) -> None:
    """Add an adapter to a layer, which becomes an adapted layer with the first one.

    Raises AttachError if something other than accelerate has replaced the layer's forward.
    """
    if not isinstance(layer, Adapted):
        check_forward(layer)
        layer.__class__ = adapted_class(type(layer))
        layer.adapters = Adapters()
        layer.route = route
        rebind_hook(layer)
    adapter.train(layer.training)
    layer.adapters[name] = adapter


def detach(layer: Layer, name: str) -> None:
    """Take an adapter away. With the last one the layer is what it was before."""
    if not isinstance(layer, Adapted) or name not in layer.adapters:
        return
    del layer.adapters[name]
    if not len(layer.adapters):
        base = base_class(layer)
        if type(layer) is not adapted_class(base):
            raise AttachError(
                f"{type(layer).__name__} was wrapped after the adapter was attached (by FSDP?); detach before sharding."
            )
        del layer.adapters
        del layer.route
        layer.__class__ = base  # type: ignore[assignment]
        rebind_hook(layer)


def check_forward(layer: nn.Module) -> None:
    """Raise AttachError if an instance-level forward would hide the adapted one.

    accelerate puts its hook there and calls `_old_forward`, which attach and detach rebind.
    """
    if "forward" in vars(layer) and "_old_forward" not in vars(layer):
        raise AttachError(
            f"The forward method of this {type(layer).__name__} was replaced on the instance, so an adapter would be "
            "ignored. Attach the adapter first, then patch forward."
        )


def rebind_hook(layer: Layer) -> None:
    """Let accelerate's hook call the forward of the class the layer has now."""
    if "_old_forward" in vars(layer):
        layer._old_forward = MethodType(type(layer).forward, layer)

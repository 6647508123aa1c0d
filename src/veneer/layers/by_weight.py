"""Lay adapters over parameters that a module reads in its forward, instead of being called: fused experts, the
projections of `torch.nn.MultiheadAttention`.

Within the owner's forward, and only there, reading such a parameter answers the weight with the adapters in it.
Everywhere else (state_dict, FSDP, a merge) it answers the registered parameter. What is answered is kept by thread,
so that one model may run in several at once.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import AttachError
from veneer.layers import swap
from veneer.layers.adapter import Adapter
from veneer.layers.attach import CHILD, Adapted, Adapters
from veneer.layers.kinds import Layer
from veneer.layers.merging import merged_values
from veneer.layers.route import Route
from veneer.layers.weights.dense import stored_as_parameter


class ByParameter(nn.Module):
    """One adapter's factors for several parameters of a module, by the parameters' names."""

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """(parameter's name, adapter)."""
        yield from self._modules.items()  # type: ignore[misc]


class _Inside(threading.local):
    """What this thread is inside of: (module, weights to be answered) of each forward, the innermost first."""

    frames: tuple[tuple[nn.Module, dict[str, Tensor]], ...] = ()


_INSIDE = _Inside()


class ByWeight(Adapted):
    """Placed in front of a module that reads its parameters: its own forward, over weights with the adapters in them.

    reads  names of child modules whose weights this module reads without calling them
    """

    by_rows = False
    reads: tuple[str, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output, each adapted parameter being its weight with the acting adapters in it."""
        readers = [self, *(getattr(self, name) for name in self.reads)]
        frames = [(module, module._effective()) for module in readers if isinstance(module, ByWeight)]
        outside = _INSIDE.frames
        _INSIDE.frames = (*frames, *outside)
        held = [(module, _held_back(module, weights)) for module, weights in frames]
        try:
            return super(Adapted, self).forward(*args, **kwargs)
        finally:
            _INSIDE.frames = outside
            for module, attributes in held:
                vars(module).update(attributes)

    def __getattr__(self, name: str) -> Any:
        # torch looks here for parameters: they are no attributes of the instance
        for module, weights in _INSIDE.frames:
            if module is self and name in weights:
                return weights[name]
        return super().__getattr__(name)

    def _effective(self) -> dict[str, Tensor]:
        """The adapted parameters' weights with the acting adapters in them, by name."""
        if self._veneer_merged is not None:
            return {}
        acting: dict[str, list[Adapter]] = {}
        for step in self._veneer_route.plan:
            if step.name not in self.adapters:
                continue
            if step.part is not None:
                raise AttachError(
                    f"Adapter {step.name!r} adapts a weight that {swap.base_class(self).__name__} reads for the whole "
                    "batch, so it cannot serve some of its rows or tokens only. Choose one adapter with set_adapter."
                )
            mine: Any = self.adapters[step.name]
            for parameter, adapter in mine.items():
                acting.setdefault(parameter, []).append(adapter)
        return {
            parameter: merged_weight(self._registered(parameter), adapters) for parameter, adapters in acting.items()
        }

    def _veneer_merged_with(self, names: Sequence[str], originals: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, list[Adapter]] = {}
        for name in names:
            mine: Any = self.adapters[name]
            for parameter, adapter in mine.items():
                found.setdefault(parameter, []).append(adapter)
        values: dict[str, Tensor] = {}
        for parameter, adapters in found.items():
            what = f"{parameter} of this {swap.base_class(self).__name__}"
            values |= merged_values(self, parameter, adapters, what, originals.get(parameter))
        return values

    def _registered(self, parameter: str) -> Tensor:
        weight = stored_as_parameter(self, parameter)
        if weight is None:
            raise AttachError(
                f"{parameter} of {swap.base_class(self).__name__} is no registered parameter any more (under "
                "torch.nn.DataParallel, or a parametrization), so its adapters would be ignored. Use "
                "DistributedDataParallel or fully_shard, and parametrize before attaching."
            )
        return weight


def _held_back(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Take these attributes off the instance and return them: reading them would not come by `__getattr__`.

    FullyShardedDataParallel puts the gathered weight there for the time of a forward.
    """
    own = vars(module)
    return {name: own.pop(name) for name in names if name in own}


class ByWeightAttention(ByWeight):
    """For `torch.nn.MultiheadAttention`, which reads the weight of its output projection too."""

    reads = ("out_proj",)


def merged_weight(weight: Tensor, adapters: list[Adapter]) -> Tensor:
    """The weight with adapters in it, in order, differentiable in the adapters; in the weight's dtype.

    A plain sum is made in that dtype, where rounding the result outweighs rounding the update; norms are not.
    """
    plain = all(adapter.rule == "add" for adapter in adapters)
    base = weight if plain else weight.to(torch.promote_types(weight.dtype, adapters[0].lora_A.dtype))
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _in_turn(base, adapters).to(weight.dtype)
    return _in_turn(base, adapters).to(weight.dtype)


def _in_turn(base: Tensor, adapters: list[Adapter]) -> Tensor:
    total = base
    for adapter in adapters:
        total = adapter.merged(total, base)
    return total


def attach(module: Layer, name: str, adapter: Adapter, route: Route, parameter: str) -> None:
    """Add an adapter to a parameter of a module, which becomes an adapted one with the first.

    Raises AttachError if something other than accelerate has replaced the module's forward.
    """
    if not isinstance(module, ByWeight):
        front = ByWeightAttention if isinstance(module, nn.MultiheadAttention) else ByWeight
        swap.lay_over(module, front, CHILD, Adapters(), route)
    adapters: Any = module.adapters
    if name not in adapters:
        adapters[name] = ByParameter()
    adapters[name].add_module(parameter, adapter)
    adapters[name].train(module.training)
    route.may_train.add(name)

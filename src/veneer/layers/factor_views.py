"""The adapters of a layer seen as PEFT keeps them: one mapping by adapter name for each of their parts.

    layer.lora_A["default"].weight      layer.scaling["default"]      layer.r["default"]

The mappings are made when they are asked for. What is written to them, or to a parameter of a part, is written to the
adapter. R rank.
"""

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import ArgumentError, MergeError
from veneer.layers.adapter import Adapter, checked_factor
from veneer.layers.kinds import Layer


class ByName(MutableMapping[str, Any]):
    """One part of each adapter on a layer that has it."""

    def __init__(self, layer: Layer, view: "View") -> None:
        self._route = layer._veneer_route
        self._adapters = {name: sole(own) for name, own in layer.adapters.items()}
        self._view = view

    def __getitem__(self, name: str) -> Any:
        adapter = self._found(name)
        if not isinstance(adapter, Adapter):
            raise ArgumentError(
                f"Adapter {name!r} lies on several weights of this layer ({', '.join(adapter)}), each with a part of "
                f"this name: they are in layer.adapters[{name!r}]."
            )
        return self._view.read(adapter)

    def __setitem__(self, name: str, value: Any) -> None:
        adapter = self._found(name)
        if self._view.write is None or not isinstance(adapter, Adapter):
            raise ArgumentError("This follows from the adapter's config and values, and cannot be set.")
        if self._route.in_weights:
            raise MergeError("What is set would not be in the merged weights: unmerge first.")
        self._view.write(adapter, value)

    def __delitem__(self, name: str) -> None:
        raise ArgumentError(f"A part of an adapter cannot be deleted: call delete_adapter({name!r}).")

    def __iter__(self) -> Iterator[str]:
        return (name for name, adapter in self._adapters.items() if self._has(adapter))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _has(self, adapter: "Adapter | dict[str, Adapter]") -> bool:
        return all(map(self._view.has, [adapter] if isinstance(adapter, Adapter) else adapter.values()))

    def _found(self, name: str) -> "Adapter | dict[str, Adapter]":
        adapter = self._adapters[name]
        if not self._has(adapter):
            raise KeyError(name)
        return adapter


@dataclass(frozen=True)
class View:
    """How one part of an adapter is seen.

    has    whether an adapter has it
    write  None for what cannot be set
    """

    read: Callable[[Adapter], Any]
    write: Callable[[Adapter, Any], None] | None = None
    has: Callable[[Adapter], bool] = lambda adapter: True


def sole(own: Any) -> "Adapter | dict[str, Adapter]":
    """The adapter that a layer has under a name; several by the names of their weights, where it reads several."""
    if isinstance(own, Adapter):
        return own
    several: dict[str, Adapter] = dict(own.items())
    return next(iter(several.values())) if len(several) == 1 else several


class _Through(dict[str, Any]):
    """The parameters of a part: one that is assigned becomes the adapter's."""

    def __init__(self, adapter: Adapter, names: dict[str, str]) -> None:
        super().__init__(bias=None)
        self.update({name: getattr(adapter, own) for name, own in names.items()})
        self._adapter, self._names = adapter, names

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._adapter, self._names[name], value)
        super().__setitem__(name, value)


def _part(adapter: Adapter, **names: str) -> nn.Module:
    """A module over parameters of the adapter, a Linear if its weight is a matrix."""
    weight: Tensor = getattr(adapter, names["weight"])
    part = nn.Linear.__new__(nn.Linear if weight.dim() == 2 else nn.Module)
    nn.Module.__init__(part)
    vars(part)["_parameters"] = _Through(adapter, names)
    if weight.dim() == 2:
        vars(part).update(out_features=weight.shape[0], in_features=weight.shape[1])
    return part.train(adapter.training)


class _Dropout(nn.Module):
    """The dropout of an adapter; `p`, the share of the input that is dropped in training, is the adapter's."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        vars(self)["_of"] = adapter
        self.train(adapter.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    @property
    def p(self) -> float:
        return vars(self)["_of"].dropout

    @p.setter
    def p(self, value: float) -> None:
        if not 0 <= value < 1:
            raise ArgumentError(f"A dropout of {value!r}: must be at least 0 and less than 1.")
        vars(self)["_of"].dropout = value


def _put(*names: str) -> Callable[[Adapter, Any], None]:
    """Take the parameters of a part over, or one parameter."""

    def write(adapter: Adapter, value: Any) -> None:
        given = [value] if isinstance(value, Tensor) else [value.weight, getattr(value, "bias", None)]
        for name, new in zip(names, given, strict=False):
            own = getattr(adapter, name)
            if (own is None) != (new is None) or (own is not None and own.shape != new.shape):
                raise ArgumentError(f"{name}: what is set must have the form of what is there.")
            if own is not None and new is not own:
                setattr(adapter, name, nn.Parameter(new.detach(), requires_grad=own.requires_grad))

    return write


def _embeds(adapter: Adapter) -> bool:
    return adapter.kind.on_disk[0].startswith("lora_embedding")


VIEWS: dict[str, View] = {
    "lora_A": View(
        lambda adapter: _part(adapter, weight="lora_A"), _put("lora_A"), lambda adapter: not _embeds(adapter)
    ),
    "lora_B": View(
        lambda adapter: _part(adapter, weight="lora_B", bias="lora_bias"),
        _put("lora_B", "lora_bias"),
        lambda adapter: not _embeds(adapter),
    ),
    "lora_embedding_A": View(lambda adapter: adapter.lora_A, _put("lora_A"), _embeds),
    "lora_embedding_B": View(lambda adapter: adapter.lora_B, _put("lora_B"), _embeds),
    "lora_magnitude_vector": View(
        lambda adapter: _part(adapter, weight="lora_magnitude_vector"),
        _put("lora_magnitude_vector"),
        lambda adapter: adapter.lora_magnitude_vector is not None,
    ),
    "lora_dropout": View(_Dropout),
    "r": View(lambda adapter: adapter.lora_A.shape[0] // adapter.kind.matrices),
    "scaling": View(
        lambda adapter: float(adapter.scale), lambda adapter, value: adapter.rescale(checked_factor(value))
    ),
    "use_dora": View(lambda adapter: adapter.rule == "dora"),
    "lora_bias": View(lambda adapter: adapter.lora_bias is not None),
}

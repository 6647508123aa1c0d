"""Layers that read one input, such as an attention's q, k and v: one product with all their A's instead of one each.

Which layers these are is known by their names. The first that is called multiplies for all; the others find their
part if they are called with the very same input, and multiply for themselves otherwise.
Shapes: `...` leading dimensions; I in, R rank.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from veneer.functional import lora_linear
from veneer.layers.kinds import Layer

if TYPE_CHECKING:
    from veneer.layers.adapter import Adapter

_SIBLINGS = "siblings"  # where a layer's `adapters` have the layers, itself among them, that read what it reads

_READ_ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),  # Llama and most after it
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),  # BERT, ViT
    ("q", "k", "v"),  # T5
    ("wi_0", "wi_1"),
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("to_q", "to_k", "to_v"),  # diffusers
    ("w1", "w3"),  # Mixtral's experts in transformers 4, Llama as first published
)
# attention whose keys and values come from another sequence than its queries
_CROSS_ATTENTION = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "attn2")
Projected = tuple[Tensor, Tensor]

_WORTH_STACKING = 4  # inputs for each row of the stacked A's: below, copying them costs more than it saves


class _Part(NamedTuple):
    """x Aᵀ for one layer, and the A it was made with, as that was."""

    h: Tensor
    A: Tensor
    version: int
    trains: bool

    def is_of(self, A: Tensor) -> bool:
        return self.A is A and self.version == A._version and self.trains == A.requires_grad


class _Product(NamedTuple):
    """What was multiplied for all layers that read x; `passed` is x as the frozen layers should read it."""

    x: "weakref.ref[Tensor]"
    state: tuple[object, ...]
    passed: Tensor
    parts: dict[int, _Part]  # by id of the adapter; each is taken once

    def is_of(self, x: Tensor, state: tuple[object, ...]) -> bool:
        return self.x() is x and self.state == state and not getattr(self.passed.grad_fn, "spent", False)


class _Last(threading.local):
    """The last product in this thread that others may still take their part of."""

    product: _Product | None = None


_LAST = _Last()


def introduce(find: Callable[[str], nn.Module], paths: Iterable[str]) -> None:
    """Tell the layers at these paths, where `find` finds modules, which of their neighbours read what they read."""
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in paths):
        children = find(parent)._modules
        crosses = parent.rpartition(".")[2] in _CROSS_ATTENTION
        for names in _READ_ONE_INPUT:
            there: list[Layer] = [layer for name in names[crosses:] if (layer := children.get(name)) is not None]
            siblings = tuple(layer for layer in there if "adapters" in layer._modules)
            for layer in siblings:
                vars(layer.adapters)[_SIBLINGS] = siblings


def project(layer: Layer, adapter: "Adapter", x: Tensor, together: "Callable[[Layer, Adapter], bool]") -> Projected:
    """(x as the frozen layer should read it, x Aᵀ of shape (..., R)), for a layer in whose input nothing is dropped.

    together  whether a product for another layer may be made with this one's, given its adapter
    """
    state = (x._version, x.requires_grad, torch.is_grad_enabled())
    product = _LAST.product
    if product is not None and product.is_of(x, state):
        part = product.parts.pop(id(adapter), None)
        if not product.parts:
            _LAST.product = None
        if part is not None and part.is_of(adapter.lora_A):
            return product.passed, part.h
    adapters = _adapters_together(layer, adapter, x, together)
    passed, hs = lora_linear.project(x, [one.lora_A.to(x.dtype) for one in adapters])
    if len(adapters) > 1:
        parts = {
            id(one): _Part(h, one.lora_A, one.lora_A._version, one.lora_A.requires_grad)
            for one, h in zip(adapters[1:], hs[1:], strict=True)
        }
        _LAST.product = _Product(weakref.ref(x), state, passed, parts)
    return passed, hs[0]


def _adapters_together(
    layer: Layer, adapter: "Adapter", x: Tensor, together: "Callable[[Layer, Adapter], bool]"
) -> "list[Adapter]":
    """The adapter, and those of the layers after it that read the same input."""
    siblings, plan = vars(layer.adapters).get(_SIBLINGS, ()), layer._veneer_route.plan
    if len(plan) != 1:
        return [adapter]
    name, features = plan[0].name, x.shape[-1]
    found, later = [adapter], False
    for sibling in siblings:
        if later and name in getattr(sibling, "adapters", ()):
            other = sibling.adapters[name]
            if together(sibling, other) and other.lora_A.device == x.device and other.lora_A.shape[1:] == (features,):
                found.append(other)
        later = later or sibling is layer
    width = sum(len(one.lora_A) for one in found)
    return found if x.numel() > _WORTH_STACKING * width * features else [adapter]

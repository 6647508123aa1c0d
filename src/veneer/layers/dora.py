"""The rule "dora": z = g · (y - bias + u) + bias, where y is the layer's output, u the update and g = m / ‖W + sBA‖.

With dropout u and what g - 1 multiplies are those of the dropped input. `forward` and `merged` are twins.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from veneer.functional import dora, dora_dropout, lowrank
from veneer.functional.dropout import new_seed
from veneer.functional.transforms import is_plain, is_transformed
from veneer.layers.fast_path import as_computed, frozen_with_update, is_dense
from veneer.layers.kinds import Kind, Layer
from veneer.layers.kinds.kind import last_dimension, linear_base_update
from veneer.layers.norms import gain
from veneer.layers.weights import read

if TYPE_CHECKING:
    from veneer.layers.adapter import Adapter


def forward(adapter: "Adapter", x: Tensor, y: Tensor, layer: Layer, p: float) -> Tensor:
    """The layer's output y with the adapter."""
    kind, (A, B), W = adapter.kind, adapter.factors(), read(layer)
    g_O = gain(adapter, layer, W)
    if p == 0 and _is_linear(kind) and _are_plain(x, y, A, B, g_O, layer.bias):
        return dora.with_gain(y + lowrank.update_linear(x, A, B, adapter.scale), g_O, layer.bias)
    base, u = kind.base_update(layer, x, y, kind.to_matrix(W.to(A.dtype)), A, B, adapter.scale, p)
    g_O = kind.spread(g_O, y)
    return y + (g_O - 1) * base + g_O * u


def whole(adapter: "Adapter", x: Tensor, layer: Layer) -> Tensor:
    """The output of a layer that takes the fast path, with the adapter."""
    g_O = gain(adapter, layer, layer.weight if is_dense(layer) else read(layer))
    if not (adapter.training and adapter.dropout):
        return dora.with_gain(frozen_with_update(layer, adapter, x), g_O, layer.bias)
    p, (x, W, bias) = adapter.dropout, as_computed(layer, x)
    update = {"scale": float(adapter.scale), "p": p, "seed": new_seed(), "sparse": dora_dropout.sparse_pays(x, p)}
    return dora_dropout.dora_dropped(x, W, bias, *adapter.factors(), g_O, **update)


def merged(adapter: "Adapter", W: Tensor, base: Tensor) -> Tensor:
    """The weight W with the adapter in it; `base` is the weight before any adapter."""
    kind, delta = adapter.kind, adapter.delta(W.shape, W.dtype)
    g_O = adapter.gain(base, delta)
    return kind.from_matrix(kind.to_matrix(W + delta) * g_O.unsqueeze(1), W.shape)


def _is_linear(kind: Kind) -> bool:
    return kind.base_update is linear_base_update and kind.spread is last_dimension


def _are_plain(*tensors: Tensor | None) -> bool:
    return not is_transformed() and all(map(is_plain, tensors))

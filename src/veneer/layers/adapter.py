"""One adapter on one layer: its factors, and the rule by which they join the layer's output.

A rule is a pair of twins: `forward` on activations, `merged` on the weight. One test ties them.
Shapes: I in, O out, R rank; `...` any leading dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.functional import dora, lowrank
from veneer.init import Factors
from veneer.layers.kinds import Kind, Layer
from veneer.layers.weights import read


class Adapter(nn.Module):
    """A of shape (R, I), B of shape (O, R), for DoRA a magnitude m of shape (O,), and how they are used."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def __init__(
        self, kind: Kind, factors: Factors, *, scale: float, dropout: float = 0.0, magnitude: Tensor | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.scale = scale
        self.dropout = dropout
        self.rule = "add" if magnitude is None else "dora"
        self.lora_A = nn.Parameter(factors.A)
        self.lora_B = nn.Parameter(factors.B)
        self.register_parameter("lora_magnitude", None if magnitude is None else nn.Parameter(magnitude))

    def forward(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        """(layer input, layer output so far) -> layer output with this adapter, in y's dtype."""
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        p = self.dropout if self.training else 0.0
        return RULES[self.rule].forward(self, x, y, layer, p).to(y.dtype)

    def merged(self, W: Tensor, base: Tensor) -> Tensor:
        """The weight W with this adapter in it; `base` is the weight before any adapter. Both in one dtype."""
        return RULES[self.rule].merged(self, W, base)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        rank = self.lora_A.shape[0]
        return f"{self.rule}, rank={rank}, scale={self.scale:g}, dropout={self.dropout:g}"


@dataclass(frozen=True)
class Rule:
    """How an update joins the output, and the weight that does the same."""

    forward: Callable[[Adapter, Tensor, Tensor, Layer, float], Tensor]
    merged: Callable[[Adapter, Tensor, Tensor], Tensor]


def _add_forward(adapter: Adapter, x: Tensor, y: Tensor, layer: Layer, p: float) -> Tensor:
    return y + adapter.kind.update(layer, x, adapter.lora_A, adapter.lora_B, adapter.scale, p)


def _add_merged(adapter: Adapter, W: Tensor, base: Tensor) -> Tensor:
    delta = lowrank.delta(adapter.lora_A.to(W.dtype), adapter.lora_B.to(W.dtype), adapter.scale)
    return W + adapter.kind.from_matrix(delta)


def _dora_forward(adapter: Adapter, x: Tensor, y: Tensor, layer: Layer, p: float) -> Tensor:
    A_RI, B_OR, m_O = adapter.lora_A, adapter.lora_B, adapter.lora_magnitude
    assert m_O is not None
    W_OI = adapter.kind.to_matrix(read(layer).to(A_RI.dtype))
    g_O = dora.gain(m_O, dora.row_norms(W_OI, A_RI, B_OR, adapter.scale))
    base, u = adapter.kind.base_update(layer, x, y, A_RI, B_OR, adapter.scale, p)
    return y + (g_O - 1) * base + g_O * u


def _dora_merged(adapter: Adapter, W: Tensor, base: Tensor) -> Tensor:
    kind, A_RI, B_OR = adapter.kind, adapter.lora_A.to(W.dtype), adapter.lora_B.to(W.dtype)
    assert adapter.lora_magnitude is not None
    norms_O = dora.row_norms(kind.to_matrix(base), A_RI, B_OR, adapter.scale)
    g_O = dora.gain(adapter.lora_magnitude.to(W.dtype), norms_O)
    V_OI = torch.addmm(kind.to_matrix(W), B_OR, A_RI, alpha=adapter.scale)
    return kind.from_matrix(V_OI * g_O.unsqueeze(1))


RULES: dict[str, Rule] = {
    "add": Rule(_add_forward, _add_merged),
    "dora": Rule(_dora_forward, _dora_merged),
}

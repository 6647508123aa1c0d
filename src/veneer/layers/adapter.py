"""One adapter on one layer: its factors, and the rule by which they join the layer's output.

A rule is a pair of twins: `forward` on activations, `merged` on the weight. One test ties them.
Shapes: I in, O out, R rank; `...` any leading dimensions. A and B have the shapes that their kind gives them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.errors import ArgumentError
from veneer.functional import dora
from veneer.init import Factors
from veneer.layers import dora as dora_rule
from veneer.layers.fast_path import frozen_with_update
from veneer.layers.kinds import Kind, Layer, Number
from veneer.layers.weights.offloaded import Resident


def checked_factor(value: float) -> float:
    """The value if it is a finite number. Raises ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentError(f"A scale is multiplied by a number, not by {value!r} ({type(value).__name__}).")
    if not math.isfinite(value):
        raise ArgumentError(f"A scale cannot be multiplied by {value}.")
    return float(value)


class Adapter(Resident):
    """A of shape (R, I), B of shape (O, R), for DoRA a magnitude m of shape (O,), and how they are used.

    An adapter whose start is taken off the base (PiSSA, say) keeps A and B as they were at the start, A₀ and B₀, and
    is the update s·(BA − B₀A₀). So the base stays what it was, and the update is one of rank 2R.

    frozen         which of "A" and "B" do not train
    trained_scale  the factor of the update that A and B were trained with
    scale          the factor that is used
    lora_bias      a trained bias of shape (O,), scaled like the update, or None
    casts_input    whether the input is cast to the dtype of A; False where hooks see to that, as diffusers' do
    lora_dropout   where there is dropout, its probability: trainers switch it off in every `nn.Dropout` of a model
    """

    kind: Kind
    trained_scale: float
    scale: Number
    rule: str
    frozen: tuple[str, ...]
    casts_input: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    lora_dropout: nn.Dropout
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        kind: Kind,
        factors: Factors,
        *,
        scale: float,
        dropout: float = 0.0,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
        start: Factors | None = None,
        frozen: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        # straight into torch's tables: assigned one by one, each value is looked at again, on thousands of layers
        vars(self).update(
            kind=kind,
            trained_scale=scale,
            scale=scale,
            rule="add" if magnitude is None else "dora",
            frozen=frozen,
            casts_input=True,
        )
        self._parameters.update(
            lora_A=nn.Parameter(factors.A, requires_grad="A" not in frozen),
            lora_B=nn.Parameter(factors.B, requires_grad="B" not in frozen),
            lora_bias=None if bias is None else nn.Parameter(bias),
            lora_magnitude_vector=None if magnitude is None else nn.Parameter(magnitude),
        )
        self._buffers.update(
            start_A=None if start is None else start.A,
            start_B=None if start is None else start.B,
        )
        if dropout:
            self.dropout = dropout

    @property
    def dropout(self) -> float:
        """The probability that an element of the input is dropped in training."""
        return self.lora_dropout.p if "lora_dropout" in self._modules else 0.0

    @dropout.setter
    def dropout(self, p: float) -> None:
        if "lora_dropout" in self._modules:
            self.lora_dropout.p = p
        elif p:
            self.lora_dropout = nn.Dropout(p)

    def become(self, *, scale: float, dropout: float, frozen: tuple[str, ...]) -> None:
        """Take over what goes with other values."""
        vars(self).update(trained_scale=scale, frozen=frozen)
        self.rescale(scale)
        if self.dropout != dropout:
            self.dropout = dropout

    def freeze(self) -> None:
        """Let nothing here get gradients."""
        for parameter in self._parameters.values() if not self._modules else self.parameters():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that train when the adapter does."""
        kept = [f"lora_{factor}" for factor in self.frozen]
        # parametrized by torch, a parameter lies in a child
        own = self._parameters.items() if self._modules.keys() <= {"lora_dropout"} else self.named_parameters()
        return (parameter for name, parameter in own if parameter is not None and name not in kept)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update: the trained ones, and those of the start with the sign turned."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return self.kind.summed(self.lora_A, self.lora_B, self.start_A, -self.start_B)

    def forward(self, x: Tensor, y: Tensor | None, layer: Layer) -> Tensor:
        """(layer input, layer output so far) -> layer output with this adapter, in y's dtype.

        Without y the layer's own output is computed here too, which only the fast path does.
        """
        if y is None:
            return RULES[self.rule].whole(self, x, layer)
        if self.casts_input and x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        p = self.dropout if self.training else 0.0
        return RULES[self.rule].forward(self, x, y, layer, p).to(y.dtype)

    def rescale(self, scale: float) -> None:
        """Use this factor from now on. A scale that is a tensor stays the same one, which compiled code reads."""
        if isinstance(self.scale, Tensor):
            self.scale.fill_(scale)
        else:
            vars(self)["scale"] = scale

    def is_rescaled(self) -> bool:
        """Whether the factor in use is another than the one A and B were trained with."""
        return not math.isclose(float(self.scale), self.trained_scale, rel_tol=1e-6)

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The update as a weight of this shape, computed in this dtype."""
        A, B = self.factors()
        return self.kind.weight_delta(A.to(dtype), B.to(dtype), self.scale, shape)

    def merged(self, W: Tensor, base: Tensor) -> Tensor:
        """The weight W with this adapter in it; `base` is the weight before any adapter. Both in one dtype."""
        return RULES[self.rule].merged(self, W, base)

    def gain(self, base: Tensor, delta: Tensor) -> Tensor:
        """What DoRA multiplies each output by, of shape (O,); `base` as for `merged`, `delta` the update of it."""
        assert self.lora_magnitude_vector is not None
        with torch.no_grad():
            norms_O = self.kind.row_norms(base + delta)
        return dora.gain(self.lora_magnitude_vector.to(base.dtype), norms_O)

    def bias_delta(self, dtype: torch.dtype) -> Tensor | None:
        """What the adapter adds to the layer's bias, of shape (O,); None if nothing."""
        return None if self.lora_bias is None else self.lora_bias.to(dtype) * self.scale

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        rank = self.lora_A.shape[0] // self.kind.matrices
        return f"{self.rule}, rank={rank}, scale={float(self.scale):g}, dropout={self.dropout:g}"


@dataclass(frozen=True)
class Rule:
    """How an update joins the output, and the weight that does the same.

    forward  (adapter, x, y, layer, p) -> y, the layer's output so far, with the adapter
    whole    (adapter, x, layer) -> the output of a layer that takes the fast path, with the adapter
    merged   (adapter, W, base) -> the weight W with the adapter
    """

    forward: Callable[[Adapter, Tensor, Tensor, Layer, float], Tensor]
    whole: Callable[[Adapter, Tensor, Layer], Tensor]
    merged: Callable[[Adapter, Tensor, Tensor], Tensor]


def _add_forward(adapter: Adapter, x: Tensor, y: Tensor, layer: Layer, p: float) -> Tensor:
    A, B = adapter.factors()
    u = adapter.kind.update(layer, x, A, B, adapter.scale, p)
    if adapter.lora_bias is not None:
        u = u + adapter.kind.spread(adapter.lora_bias * adapter.scale, u)
    return y + u


def _add_merged(adapter: Adapter, W: Tensor, base: Tensor) -> Tensor:
    return W + adapter.delta(W.shape, W.dtype)


RULES: dict[str, Rule] = {
    "add": Rule(_add_forward, lambda adapter, x, layer: frozen_with_update(layer, adapter, x), _add_merged),
    "dora": Rule(dora_rule.forward, dora_rule.whole, dora_rule.merged),
}

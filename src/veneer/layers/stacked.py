"""The factors of several adapters on one linear layer as one tensor each, in the order of the groups of rows.

LoRA, DoRA, biases, scales and ranks may be mixed: what an adapter does to its rows is g ∘ (y + s·BAx) + c, where g is
DoRA's gain or 1, and c what becomes of biases.
Shapes: N rows, T tokens, I in, O out, R rank, K adapters; G groups of S rows, each with one adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer, Number
from veneer.layers.norms import gain
from veneer.layers.row_groups import Groups
from veneer.layers.weights import read


@dataclass(frozen=True, eq=False)
class Stack:
    """What one batched product needs.

    scale  s; (G, 1, 1) if they differ
    B_GRO  with DoRA's gains in it
    gain   (N, 1, O), None where all are 1
    shift  (N, 1, O), None where nothing is added
    """

    A_GRI: Tensor
    B_GRO: Tensor
    scale: Number
    gain: Tensor | None
    shift: Tensor | None

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))


def stacked(adapters: Sequence[Adapter], groups: Groups, batch: int, layer: Layer, *, lasting: bool) -> Stack:
    """The stack of K adapters, differentiable in all of their parameters. Ranks are padded with zeros.

    lasting  whether it is used again and again, which pays for the order that products like best
    """
    As, Bs = zip(*map(_factors, adapters), strict=True)
    alike = len({A.shape[0] for A in As}) == 1
    A_KRI = torch.stack(As) if alike else pad_sequence(list(As), batch_first=True)
    B_KRO = torch.stack(Bs).mT if alike else pad_sequence([B.mT for B in Bs], batch_first=True)
    gain_KO, shift_KO = _gains(adapters, layer), _shifts(adapters)
    if gain_KO is not None:
        B_KRO = (B_KRO * gain_KO.unsqueeze(1)).to(B_KRO.dtype)
        if layer.bias is not None:  # DoRA leaves the layer's own bias as it is
            kept_KO = (1 - gain_KO) * layer.bias
            shift_KO = kept_KO if shift_KO is None else shift_KO + kept_KO
    scale = _scales(adapters)
    if groups.adapter is not None:
        A_KRI, B_KRO = A_KRI.index_select(0, groups.adapter), B_KRO.index_select(0, groups.adapter)
        scale = scale.index_select(0, groups.adapter) if isinstance(scale, Tensor) else scale
    gain, shift = (
        None if of_each is None else _by_row(of_each, filler, groups, batch)
        for of_each, filler in ((gain_KO, 1.0), (shift_KO, 0.0))
    )
    if lasting and groups.size == 1:
        B_KRO = B_KRO.contiguous()  # a product with a single row takes half the time so
    return Stack(A_KRI, B_KRO, scale, gain, shift)


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    if adapter._buffers["start_A"] is not None:
        return adapter.factors()
    return adapter._parameters["lora_A"], adapter._parameters["lora_B"]  # type: ignore[return-value]


def _by_row(v_KO: Tensor, filler: float, groups: Groups, batch: int) -> Tensor:
    """(N, 1, O): what each row has of its adapter's; the filler where it has none."""
    rest = v_KO.new_full((batch, v_KO.shape[1]), filler)
    return rest.index_copy(0, groups.rows, v_KO.index_select(0, groups.of_row)).unsqueeze(1)


def _gains(adapters: Sequence[Adapter], layer: Layer) -> Tensor | None:
    """(K, O): what each multiplies the output by; None if none of them is DoRA."""
    gains = [gain(adapter, layer, read(layer)) if adapter.rule == "dora" else None for adapter in adapters]
    some = next((one for one in gains if one is not None), None)
    return None if some is None else torch.stack([torch.ones_like(some) if one is None else one for one in gains])


def _shifts(adapters: Sequence[Adapter]) -> Tensor | None:
    """(K, O): the bias that each adds; None if none has one."""
    biases = [
        None if adapter._parameters["lora_bias"] is None else adapter.bias_delta(adapter.lora_A.dtype)
        for adapter in adapters
    ]
    some = next((bias for bias in biases if bias is not None), None)
    return None if some is None else torch.stack([torch.zeros_like(some) if bias is None else bias for bias in biases])


def _scales(adapters: Sequence[Adapter]) -> Number:
    """The scale of all, or (K, 1, 1) if they differ, then in float32 at least."""
    scales, A = [adapter.scale for adapter in adapters], adapters[0].lora_A
    dtype = torch.promote_types(A.dtype, torch.float32)
    if any(isinstance(scale, Tensor) for scale in scales):
        each = [torch.as_tensor(scale, dtype=dtype, device=A.device) for scale in scales]
        return torch.stack(each).view(-1, 1, 1)
    if len(set(scales)) == 1:
        return scales[0]
    return torch.tensor(scales, dtype=dtype, device=A.device).view(-1, 1, 1)


def add_stack(stack: Stack, groups: Groups, x: Tensor, y: Tensor, *, batch: int, p: float, own: bool) -> Tensor:
    """(layer input, layer output) -> g ∘ (y + s·BA·drop(x)) + c, row by row, in y's dtype.

    own  whether y may be overwritten
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    x_NTI, y_NTO = x.reshape(batch, -1, x.shape[-1]), y.reshape(batch, -1, y.shape[-1])
    x_NTI = x_NTI if autocast else x_NTI.to(stack.A_GRI.dtype)
    if groups.grid is not None:
        x_NTI = x_NTI.index_select(0, groups.grid)
    G, T = len(stack.A_GRI), y_NTO.shape[1]
    x_GXI = x_NTI.reshape(G, groups.size * T, -1)
    x_GXI = F.dropout(x_GXI, p) if p else x_GXI
    h_GXR = torch.bmm(x_GXI, stack.A_GRI.mT)
    alpha = 1.0
    if isinstance(stack.scale, Tensor):
        h_GXR = (h_GXR * stack.scale).to(h_GXR.dtype)
    else:
        alpha = stack.scale
    wide = y.dtype
    for value in (h_GXR, stack.gain, stack.shift):
        wide = wide if value is None else torch.promote_types(wide, value.dtype)
    own = own or y.dtype != wide
    y_NTO = y_NTO.to(wide)
    if stack.gain is not None:
        y_NTO, own = y_NTO.mul_(stack.gain) if own else y_NTO * stack.gain, True
    if stack.shift is not None:
        y_NTO, own = y_NTO.add_(stack.shift) if own else y_NTO + stack.shift, True
    if groups.grid is None and not autocast:
        y_GXO = y_NTO.reshape(G, groups.size * T, -1)
        put = y_GXO.baddbmm_ if own else y_GXO.baddbmm
        return put(h_GXR, stack.B_GRO, alpha=alpha).reshape(y.shape).to(y.dtype)
    u_NTO = torch.bmm(h_GXR * alpha, stack.B_GRO).reshape(G * groups.size, T, -1).to(wide)
    if groups.places is not None:
        u_NTO = u_NTO.index_select(0, groups.places)
    y_NTO = (y_NTO.index_add_ if own else y_NTO.index_add)(0, groups.rows, u_NTO)
    return y_NTO.reshape(y.shape).to(y.dtype)

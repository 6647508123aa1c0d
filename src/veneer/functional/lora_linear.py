"""A frozen linear layer and its update as two functions that copy and keep as little as can be: the fast path.

    x, h = project(x, [A])                            # h = drop(x) Aᵀ
    y = frozen_linear(x, W, bias, h, B, scale)        # y = x Wᵀ + bias + s · h Bᵀ

The plain twin is `F.linear(x, W, bias) + update_linear(x, A, B, scale)`. What is saved here:

- `frozen_linear` adds the update into the layer's own output, and keeps W, h and B: nothing of the output's size.
- `project` gives x on to the frozen layer, so in the backward pass it receives the frozen layer's gradient of x, and
  adds the update's into it. It keeps x once for all its A's.
- Dropout is a seed (see dropout.py), and x and its gradient go through it some rows at a time.
- `frozen_layer` is `frozen_linear` for a layer that computes x Wᵀ + bias in a way of its own, from few bits say: it
  reads W when a gradient needs it and keeps none.

Differentiable twice: where a graph of the gradients is asked for, the backward passes are plain sums and products.
Shapes: `...` leading dimensions, T their product; I in, O out, R rank.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from veneer.functional.dropout import blocks, dropped, new_seed, room


def project(x: Tensor, As: Sequence[Tensor], p: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """x itself for a frozen layer to read, and drop(x) Aᵀ of shape (..., R) for each A of shape (R, I).

    x and the A's are in the dtype to compute in: autocast is not asked.

    p  the probability that an element of x is dropped; below 1. Several A's see the same dropped x.
    """
    seed = new_seed() if p else 0
    if not (torch.is_grad_enabled() and (x.requires_grad or any(A.requires_grad for A in As))):
        return x, _projected(x, As, p, seed)
    passed, *hs = _Project.apply(x, p, seed, *As)  # type: ignore[misc]
    return passed, hs


def frozen_linear(x: Tensor, W_OI: Tensor, bias: Tensor | None, h: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """x Wᵀ + bias + s · h Bᵀ, of shape (..., O), for a weight that gets no gradient."""
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, h, B_OR))):
        return _with_update(x, W_OI, bias, h, B_OR, scale)
    return _FrozenLinear.apply(x, W_OI, bias, h, B_OR, scale)  # type: ignore[return-value]


def frozen_layer(
    x: Tensor, run: Callable[[Tensor], Tensor], read: Callable[[], Tensor], h: Tensor, B_OR: Tensor, scale: float
) -> Tensor:
    """run(x) + s · h Bᵀ, of shape (..., O), for a layer none of whose parameters gets a gradient.

    run   x -> x Wᵀ + bias as the layer computes it, a tensor of its own
    read  () -> W of shape (O, I), which the gradient of x is made with
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, h, B_OR))):
        return _on_top(run(x), h, B_OR, scale)
    return _FrozenLayer.apply(x, run, read, h, B_OR, scale)  # type: ignore[return-value]


def _on_top(y: Tensor, h: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """y + s · h Bᵀ, in y's dtype and in its place."""
    y = y.contiguous()
    if y.dtype == h.dtype:
        y.view(-1, y.shape[-1]).addmm_(_rows(h), B_OR.T, alpha=scale)
        return y
    return y.add_(F.linear(h, B_OR).to(y.dtype), alpha=scale)


def _projected(x: Tensor, As: Sequence[Tensor], p: float, seed: int) -> list[Tensor]:
    A = _stacked(As)
    h = _dropped_product(_rows(x), A, p, seed).view(*x.shape[:-1], len(A)) if p else F.linear(x, A)
    return [h] if len(As) == 1 else list(h.split([len(A) for A in As], dim=-1))


def _dropped_product(x_TI: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
    """drop(x) Aᵀ, scaled up, of shape (T, R)."""
    tokens, inputs = x_TI.shape
    h_TR, buffer = x_TI.new_zeros(tokens, len(A)), x_TI.new_empty(room(tokens, inputs, x_TI.device))
    for rows, places in blocks(tokens, inputs, p, seed, x_TI.device):
        kept = _without(x_TI[rows], places, buffer)
        torch.mm(kept, A.T, out=h_TR[rows])
    return h_TR.mul_(1 / (1 - p))


def _without(x_TI: Tensor, places: Tensor, buffer: Tensor) -> Tensor:
    """These rows of x in the buffer, with zeros at these places."""
    kept = buffer[: x_TI.numel()].view(x_TI.shape).copy_(x_TI)
    buffer.index_fill_(0, places, 0)
    return kept


def _stacked(As: Sequence[Tensor]) -> Tensor:
    return As[0] if len(As) == 1 else torch.cat(list(As))


def _with_update(x: Tensor, W_OI: Tensor, bias: Tensor | None, h: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    y = F.linear(x, W_OI, bias)
    _rows(y).addmm_(_rows(h), B_OR.T, alpha=scale)
    return y


def _rows(x: Tensor) -> Tensor:
    """(..., N) -> (T, N)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class _Project(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, *As: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *As)
        ctx.p, ctx.seed = p, seed
        ctx.set_materialize_grads(False)
        passed = x.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        return passed, *_projected(x, As, p, seed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        x, *As = ctx.saved_tensors
        ctx.spent = True
        p, wanted = ctx.p, ctx.needs_input_grad[3:]
        g_x, *g_hs = grad_outputs
        given = {i: _rows(g) for i, g in enumerate(g_hs) if g is not None}
        if not given:
            return g_x, None, None, *[None] * len(As)
        there = list(given)
        g_h = torch.cat(list(given.values()), dim=1) if len(there) > 1 else given[there[0]]
        if p:
            g_h = g_h / (1 - p)
        for_x, for_A, A = ctx.needs_input_grad[0], any(wanted[i] for i in there), _stacked([As[i] for i in there])
        if p and not torch.is_grad_enabled():
            g_x, g_A = _dropped_gradients(g_x, g_h, x, A, p, ctx.seed, for_x=for_x, for_A=for_A)
        else:
            g_A = g_h.T @ _rows(dropped(x, p, ctx.seed) if p else x) if for_A else None
            g_x = _joined(g_x, g_h, A, x.shape, p, ctx.seed) if for_x else None
        gradients: list[Tensor | None] = [None] * len(As)
        if g_A is not None:
            for i, part in zip(there, g_A.split([len(As[i]) for i in there]), strict=True):
                gradients[i] = part if wanted[i] else None
        return g_x, None, None, *gradients


def _joined(g_x: Tensor | None, g_h: Tensor, A: Tensor, shape: torch.Size, p: float, seed: int) -> Tensor:
    """The gradient of x: the frozen layer's, and the update's drop(g_h A)."""
    if g_x is None or torch.is_grad_enabled():
        own = (g_h @ A).view(shape)
        own = dropped(own, p, seed) if p else own
        return own if g_x is None else g_x + own
    # nobody else holds g_x: it is what frozen layers that read our x, and nothing else does, have made
    g_x = g_x.contiguous()
    g_x.view(-1, shape[-1]).addmm_(g_h, A)
    return g_x


def _dropped_gradients(
    g_x: Tensor | None, g_h: Tensor, x: Tensor, A: Tensor, p: float, seed: int, *, for_x: bool, for_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, as `_joined` gives it, and of the A's, both of whose places are drawn once."""
    x_TI, own_TI = _rows(x), None
    (tokens, inputs), wide = x_TI.shape, torch.promote_types(A.dtype, torch.float32)
    g_A = torch.zeros_like(A, dtype=wide) if for_A else None  # wide: it is the sum of the blocks'
    if for_x:
        own_TI = torch.zeros_like(x_TI) if g_x is None else g_x.contiguous().view(tokens, inputs)  # as above
    buffer = x_TI.new_empty(room(tokens, inputs, x.device))
    for rows, places in blocks(tokens, inputs, p, seed, x.device):
        if g_A is not None:
            g_A += g_h[rows].T @ _without(x_TI[rows], places, buffer)
        if own_TI is not None:
            own = torch.mm(g_h[rows], A, out=buffer[: x_TI[rows].numel()].view(-1, inputs))
            buffer.index_fill_(0, places, 0)
            own_TI[rows].add_(own)
    return None if own_TI is None else own_TI.view(x.shape), None if g_A is None else g_A.to(A.dtype)


class _FrozenLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_OI: Tensor, bias: Tensor | None, h: Tensor, B_OR: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(W_OI, h, B_OR)
        ctx.scale = scale
        return _with_update(x, W_OI, bias, h, B_OR, scale).detach()  # no view, so that it may change in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        W_OI, h, B_OR = ctx.saved_tensors
        for_x, _, for_bias, for_h, for_B, _ = ctx.needs_input_grad
        g_T = _rows(g)
        g_x = (g_T @ W_OI).view(*g.shape[:-1], W_OI.shape[1]) if for_x else None
        g_bias = g_T.sum(0) if for_bias else None
        g_h = ((g_T @ B_OR) * ctx.scale).view(h.shape) if for_h else None
        g_B = (g_T.T @ _rows(h)) * ctx.scale if for_B else None
        return g_x, None, g_bias, g_h, g_B, None


class _FrozenLayer(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        run: Callable[[Tensor], Tensor],
        read: Callable[[], Tensor],
        h: Tensor,
        B_OR: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(h, B_OR)
        ctx.scale, ctx.read, ctx.shape = scale, read, x.shape
        return _on_top(run(x), h, B_OR, scale).detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        h, B_OR = ctx.saved_tensors
        for_x, _, _, for_h, for_B, _ = ctx.needs_input_grad
        g_T = _rows(grad_outputs[0]).to(h.dtype)
        g_x = (g_T @ ctx.read().to(g_T.dtype)).view(ctx.shape) if for_x else None
        g_h = ((g_T @ B_OR) * ctx.scale).view(h.shape) if for_h else None
        g_B = (g_T.T @ _rows(h)) * ctx.scale if for_B else None
        return g_x, None, None, g_h, g_B, None

"""DoRA over a frozen linear layer with dropout: z = W x + b + (g - 1) · W d + g · sBA d, where d = drop(x).

Two products with W, as x and d differ: twice the work of the layer itself. But W d is W x without what the dropped
elements contribute to it, and for a small p these are few:

    (1 - p) W d = W x - W (x where it is dropped)

In the backward pass the gradient of x is dz (1 + (g - 1) / (1 - p)) W, except at dropped elements, where it is dz W.
Dropout is kept as a seed. Beside x and h only one tensor of the output's size is kept, W d, for the gradient of g.

Shapes: I in, O out, R rank, T the product of leading dimensions, N dropped elements.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from veneer.functional.dora import graph_of, scaled_dots
from veneer.functional.dropped_elements import FEWEST_ROWS, MOST, draw, product, sampled, without
from veneer.functional.lowrank import update_linear


def can(W_OI: Tensor, p: float) -> bool:
    """Whether sparse products are made for such a weight, and so few elements that they are faster than dense ones."""
    return W_OI.device.type == "cpu" and W_OI.dtype in (torch.float32, torch.float64) and 0 < p <= MOST


def pays(x: Tensor, p: float) -> bool:
    """Whether they are faster for this input of the weight's dtype: turning the weight must be worth it."""
    return can(x, p) and x.numel() >= FEWEST_ROWS * x.shape[-1]


def dora_dropped(
    x: Tensor,
    W_OI: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    g_O: Tensor,
    *,
    scale: float,
    p: float,
    seed: int,
) -> Tensor:
    """W x + bias + (g - 1) · W drop(x) + g · s B A drop(x), of shape (..., O), for a weight that gets no gradient.

    p  the probability that an element of x is dropped, above 0 and below 1
    """
    return _DoraDropped.apply(x, bias_O, A_RI, B_OR, g_O, W_OI, scale, p, seed)  # type: ignore[return-value]


def dora_dropped_plainly(
    x: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    g_O: Tensor,
    W_OI: Tensor,
    scale: float,
    p: float,
    seed: int,
) -> Tensor:
    """The plain twin of `dora_dropped`: the formula with a mask."""
    inputs = x.shape[-1]
    dropped = draw(x.numel() // inputs, inputs, p, seed)
    d = x * without(torch.ones_like(x).view(-1, inputs), dropped).view(x.shape) / (1 - p)
    return F.linear(x, W_OI, bias_O) + (g_O - 1) * F.linear(d, W_OI) + g_O * update_linear(d, A_RI, B_OR, scale)


class _DoraDropped(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        g_O: Tensor,
        W_OI: Tensor,
        scale: float,
        p: float,
        seed: int,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        T, inputs = x_TI.shape
        dropped = draw(T, inputs, p, seed)
        h_TR = without(x_TI, dropped) @ A_RI.T
        z_TO = x_TI @ W_OI.T
        Wd_TO = product(x_TI, dropped, W_OI.T.contiguous())
        torch.sub(z_TO, Wd_TO, out=Wd_TO)  # (1 - p) W d
        z_TO.addcmul_(Wd_TO, (g_O - 1) / (1 - p))
        z_TO.addmm_(h_TR, _scaled(B_OR, g_O, scale, p).T)
        if bias_O is not None:
            z_TO += bias_O
        ctx.save_for_backward(x, bias_O, A_RI, B_OR, g_O, W_OI, h_TR, Wd_TO)
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        return z_TO.view(*x.shape[:-1], len(g_O)).detach()  # no view, so that it may change in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (dz,), (*inputs, W_OI, h_TR, Wd_TO) = grad_outputs, ctx.saved_tensors
        scale, p, seed, wanted = ctx.scale, ctx.p, ctx.seed, ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            plain = partial(dora_dropped_plainly, W_OI=W_OI, scale=scale, p=p, seed=seed)
            return *graph_of(plain, inputs, wanted, dz), *[None] * 4
        x, _, A_RI, B_OR, g_O = inputs
        for_x, for_bias, for_A, _, for_g = wanted
        dz_TO, x_TI = dz.reshape(-1, len(g_O)), x.reshape(-1, x.shape[-1])
        dropped = draw(x_TI.shape[0], x_TI.shape[1], p, seed)
        kept_TI, dh_TR = without(x_TI, dropped), dz_TO @ _scaled(B_OR, g_O, scale, p)
        dA = dh_TR.T @ kept_TI if for_A else None
        both_TO = torch.empty_like(dz_TO) if for_x else None  # what W gets from both its products
        dg = scaled_dots(dz_TO, Wd_TO, 1 + (g_O - 1) / (1 - p), out=both_TO, dots=for_g)
        dx = None
        if both_TO is not None:
            dx = torch.mm(both_TO, W_OI, out=kept_TI).addmm_(dh_TR, A_RI)
            at_dropped = sampled(dz_TO, W_OI.T.contiguous(), dropped)
            dx.view(-1).index_copy_(0, dropped.places.long(), at_dropped)
            dx = dx.view(x.shape)
        dz_h_OR = dz_TO.T @ h_TR * (scale / (1 - p))
        dB = dz_h_OR * g_O.unsqueeze(1)
        if dg is not None:
            dg = dg.div_(1 - p).add_((dz_h_OR * B_OR).sum(1))
        return dx, dz_TO.sum(0) if for_bias else None, dA, dB, dg, None, None, None, None


def _scaled(B_OR: Tensor, g_O: Tensor, scale: float, p: float) -> Tensor:
    """g · s B / (1 - p): thin, so that nothing else needs to be multiplied."""
    return B_OR * (g_O * (scale / (1 - p))).unsqueeze(1)

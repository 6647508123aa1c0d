"""DoRA over a frozen linear layer with dropout: z = W x + b + (g - 1) · W d + g · sBA d, where d = drop(x).

Two products with W, as x and d differ: twice the work of the layer itself. But W d is W x without what the dropped
elements contribute to it, and for a small p these are few, so that a sparse product is faster on a CPU:

    (1 - p) W d = W x - W (x where it is dropped)

In the backward pass the gradient of x is dz (1 + (g - 1) / (1 - p)) W, except at dropped elements, where it is dz W.
Dropout is kept as a seed, or for sparse products, where drawing costs more, as 4 bytes for each dropped element. Beside
x and h only one tensor of the output's size is kept, W d, for the gradient of g.

Shapes: I in, O out, R rank, T the product of leading dimensions, N dropped elements.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from veneer.functional.dora import graph_of, scaled_dots
from veneer.functional.dropout import dropped_places
from veneer.functional.dropped_elements import FEWEST_ROWS, MOST, Dropped, draw, product, sampled, without
from veneer.functional.lowrank import update_linear


def sparse_pays(x: Tensor, p: float) -> bool:
    """Whether sparse products are faster for this input: so few elements, and turning the weight is worth it."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and 0 < p <= MOST
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
    )


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
    sparse: bool,
) -> Tensor:
    """W x + bias + (g - 1) · W drop(x) + g · s B A drop(x), of shape (..., O), for a weight that gets no gradient.

    In x's dtype, which is W's; A, B and g may be wider, and g should be, as g - 1 is small.

    p       the probability that an element of x is dropped, above 0 and below 1
    sparse  by sparse products, on a CPU; other elements are dropped than without
    """
    return _DoraDropped.apply(x, bias_O, A_RI, B_OR, g_O, W_OI, scale, p, seed, sparse)  # type: ignore[return-value]


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
    sparse: bool,
) -> Tensor:
    """The plain twin of `dora_dropped`: the formula with a mask."""
    count, inputs = x.numel(), x.shape[-1]
    places = (
        draw(count // inputs, inputs, p, seed).places(inputs)
        if sparse
        else dropped_places(count // inputs, inputs, p, seed, x.device)
    )
    d = x * torch.ones_like(x).flatten().index_fill(0, places, 0).view(x.shape) / (1 - p)
    update = update_linear(d, A_RI.to(x.dtype), B_OR.to(x.dtype), scale)
    return (F.linear(x, W_OI, bias_O) + (g_O - 1) * F.linear(d, W_OI) + g_O * update).to(x.dtype)


class _Places:
    """Dropped elements of x, and the products with W that differ there: made for all elements, and taken.

    kept  tensors that spare drawing them again
    """

    def __init__(self, x_TI: Tensor, p: float, seed: int, kept: Sequence[Tensor] = ()) -> None:
        self.kept = kept
        self.places = dropped_places(x_TI.shape[0], x_TI.shape[1], p, seed, x_TI.device)

    def base(self, kept_TI: Tensor, x_TI: Tensor, z_TO: Tensor, W_OI: Tensor) -> Tensor:
        """W (x where it is kept), of shape (T, O); z is W x."""
        return kept_TI @ W_OI.T

    def gradient(self, dz_TO: Tensor, W_OI: Tensor) -> Tensor:
        """dz W at the dropped elements, of shape (N,)."""
        return (dz_TO @ W_OI).view(-1).index_select(0, self.places)


class _SparsePlaces(_Places):
    """The same by products with the dropped elements alone."""

    def __init__(self, x_TI: Tensor, p: float, seed: int, kept: Sequence[Tensor] = ()) -> None:
        self.kept = self.dropped = Dropped(*kept) if kept else draw(x_TI.shape[0], x_TI.shape[1], p, seed)
        self.places = self.dropped.places(x_TI.shape[1])

    def base(self, kept_TI: Tensor, x_TI: Tensor, z_TO: Tensor, W_OI: Tensor) -> Tensor:
        Wd_TO = torch.empty_like(z_TO)
        values = x_TI.reshape(-1).index_select(0, self.places)
        for some, Wx in product(values, self.dropped, W_OI):
            torch.sub(z_TO[:, some], Wx, out=Wd_TO[:, some])
        return Wd_TO

    def gradient(self, dz_TO: Tensor, W_OI: Tensor) -> Tensor:
        return sampled(dz_TO, W_OI, self.dropped)


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
        sparse: bool,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        dropped = (_SparsePlaces if sparse else _Places)(x_TI, p, seed)
        kept_TI = without(x_TI, dropped.places)
        h_TR = kept_TI @ A_RI.to(x.dtype).T
        z_TO = x_TI @ W_OI.T
        Wd_TO = dropped.base(kept_TI, x_TI, z_TO, W_OI)  # (1 - p) W d
        z_TO.addcmul_(Wd_TO, (g_O - 1) / (1 - p))
        z_TO.addmm_(h_TR, _scaled(B_OR, g_O, scale, p, x.dtype).T)
        if bias_O is not None:
            z_TO += bias_O
        ctx.save_for_backward(x, bias_O, A_RI, B_OR, g_O, W_OI, h_TR, Wd_TO, *dropped.kept)
        ctx.scale, ctx.p, ctx.seed, ctx.sparse = scale, p, seed, sparse
        return z_TO.view(*x.shape[:-1], len(g_O)).detach()  # no view, so that it may change in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (dz,), (x, bias_O, A_RI, B_OR, g_O, W_OI, h_TR, Wd_TO, *kept) = grad_outputs, ctx.saved_tensors
        scale, p, wanted = ctx.scale, ctx.p, ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            plain = partial(dora_dropped_plainly, W_OI=W_OI, scale=scale, p=p, seed=ctx.seed, sparse=ctx.sparse)
            return *graph_of(plain, (x, bias_O, A_RI, B_OR, g_O), wanted, dz), *[None] * 5
        for_x, for_bias, for_A, _, for_g = wanted
        dz_TO, x_TI = dz.reshape(-1, len(g_O)), x.reshape(-1, x.shape[-1])
        dropped = (_SparsePlaces if ctx.sparse else _Places)(x_TI, p, ctx.seed, kept)
        kept_TI, dh_TR = without(x_TI, dropped.places), dz_TO @ _scaled(B_OR, g_O, scale, p, x.dtype)
        dA = dh_TR.T @ kept_TI if for_A else None
        both_TO = torch.empty_like(dz_TO) if for_x else None  # what W gets from both its products
        dg = scaled_dots(dz_TO, Wd_TO, 1 + (g_O - 1) / (1 - p), out=both_TO, dots=for_g)
        dx = None
        if both_TO is not None:
            dx = torch.mm(both_TO, W_OI, out=kept_TI).addmm_(dh_TR, A_RI.to(x.dtype))
            dx.view(-1).index_copy_(0, dropped.places, dropped.gradient(dz_TO, W_OI))
            dx = dx.view(x.shape)
        dz_h_OR = (dz_TO.T @ h_TR).to(B_OR.dtype) * (scale / (1 - p))
        dB = dz_h_OR * g_O.unsqueeze(1)
        if dg is not None:
            dg = dg.div_(1 - p).add_((dz_h_OR * B_OR).sum(1))
        dA = None if dA is None else dA.to(A_RI.dtype)
        return dx, dz_TO.sum(0) if for_bias else None, dA, dB.to(B_OR.dtype), dg, *[None] * 5


def _scaled(B_OR: Tensor, g_O: Tensor, scale: float, p: float, dtype: torch.dtype) -> Tensor:
    """g · s B / (1 - p): thin, so that nothing else needs to be multiplied."""
    return (B_OR * (g_O * (scale / (1 - p))).unsqueeze(1)).to(dtype)

"""DoRA, weight-decomposed low-rank adaptation: W' = m · (W + sBA) / ‖W + sBA‖ by output row.

Liu et al. 2024, https://arxiv.org/abs/2402.09353. Shapes: I in, O out, R rank; T the product of leading dimensions.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.functional.transforms import is_plain, is_transformed

_CACHED = 2**17  # numbers that stay in a core's cache between the steps that read and write them
_BUFFERED = 2**24  # the same on other devices, where it bounds the memory alone


def row_norms(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float | Tensor) -> Tensor:
    """‖W + sBA‖ of each output row, of shape (O,), without gradient; in the widest of the dtypes, float32 at least.

    The paper (section 4.3) treats the norm as a constant in the backward pass. The sum is made for some rows at a time
    and never kept. (‖W‖² + 2s⟨WAᵀ, B⟩ + s²⟨BAAᵀ, B⟩ costs the same, and cancels where BA is near -W.)
    """
    dtype = torch.promote_types(torch.promote_types(W_OI.dtype, A_RI.dtype), torch.float32)
    device = W_OI.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        A_RI, B_OR = A_RI.to(dtype), B_OR.to(dtype) * scale
        if is_transformed() or not (is_plain(W_OI) and is_plain(A_RI) and is_plain(B_OR)):
            return torch.linalg.vector_norm(torch.addmm(W_OI.to(dtype), B_OR, A_RI), dim=1)
        if W_OI.stride(0) == 1 and W_OI.stride(1) != 1:  # kept as (I, O)
            return _column_norms(W_OI.T, A_RI, B_OR)
        norms_O = A_RI.new_empty(W_OI.shape[0])
        for rows in _slices(W_OI):
            V = torch.addmm(W_OI[rows].to(dtype), B_OR[rows], A_RI)
            torch.linalg.vector_norm(V, dim=1, out=norms_O[rows])
        return norms_O


def _column_norms(W_IO: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """The same for a weight that is kept as (I, O): the squares are summed over some inputs at a time."""
    squares_O = A_RI.new_zeros(W_IO.shape[1])
    for rows in _slices(W_IO):
        V = torch.addmm(W_IO[rows].to(A_RI.dtype), A_RI[:, rows].T, B_OR.T)
        squares_O += torch.linalg.vector_norm(V, dim=0).square_()
    return squares_O.sqrt_()


def gain(m_O: Tensor, norms_O: Tensor) -> Tensor:
    """What each output row is multiplied by: m / ‖W + sBA‖, of shape (O,). A row of zeros stays one, without 0 / 0."""
    return m_O / norms_O.masked_fill(norms_O == 0, 1.0)


def with_gain(v: Tensor, g_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """g · (v - bias) + bias for outputs v of shape (..., O): the bias is not multiplied.

    In v's dtype, rounded once. v is kept for the backward pass, and nothing else of its size. Where no gradient is
    asked for, v itself is overwritten: hand in one that nobody else reads.
    """
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (v, g_O, bias_O))):
        return torch.addcmul(_rest(g_O, bias_O, v), v, g_O, out=v)
    return _WithGain.apply(v, g_O, bias_O)  # type: ignore[return-value]


def with_gain_plainly(v: Tensor, g_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """The plain twin of `with_gain`, which overwrites nothing."""
    z = v * g_O if bias_O is None else g_O * (v - bias_O) + bias_O
    return z.to(v.dtype)


def _rest(g_O: Tensor, bias_O: Tensor | None, v: Tensor) -> Tensor:
    """What is added to g · v."""
    return g_O.new_zeros(()) if bias_O is None else (1 - g_O) * bias_O


class _WithGain(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, g_O: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(v, g_O, bias_O)
        return torch.addcmul(_rest(g_O, bias_O, v), v, g_O, out=torch.empty_like(v))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (dz,) = grad_outputs
        v, g_O, bias_O = ctx.saved_tensors
        for_v, for_g, for_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return graph_of(with_gain_plainly, (v, g_O, bias_O), ctx.needs_input_grad, dz)
        dz_TO = dz.reshape(-1, dz.shape[-1])
        dv_TO = torch.empty_like(dz_TO) if for_v else None
        dg_O = scaled_dots(dz_TO, v.reshape(dz_TO.shape), g_O, out=dv_TO, dots=for_g)
        dv = None if dv_TO is None else dv_TO.view(dz.shape)
        sum_O = dz_TO.sum(0, dtype=g_O.dtype) if bias_O is not None and (for_g or for_bias) else None
        dbias_O = None
        if sum_O is not None and bias_O is not None:
            dg_O = None if dg_O is None else dg_O - sum_O * bias_O
            dbias_O = ((1 - g_O) * sum_O).to(bias_O.dtype) if for_bias else None
        return dv, dg_O, dbias_O


def scaled_dots(dz_TO: Tensor, v_TO: Tensor, a_O: Tensor, *, out: Tensor | None, dots: bool = True) -> Tensor | None:
    """The dot products of the columns of dz and v, of shape (O,) in a's dtype; and dz · a in `out`, in one pass."""
    dots_O = torch.zeros_like(a_O) if dots else None
    for rows in _slices(dz_TO):
        dz = dz_TO[rows]
        if out is not None:
            torch.mul(dz, a_O, out=out[rows])
        if dots_O is not None:
            dots_O += (dz.to(a_O.dtype) * v_TO[rows]).sum(0)
    return dots_O


def _slices(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix, so many at a time that what is computed of them stays near."""
    most = _CACHED if matrix.device.type == "cpu" else _BUFFERED
    step = max(1, most // max(1, matrix.shape[1]))
    return (slice(start, start + step) for start in range(0, max(1, matrix.shape[0]), step))


def graph_of(plain: Any, inputs: Sequence[Any], wanted: Sequence[bool], dz: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a function's plain twin with a graph of their own, None for inputs that need none."""
    with torch.enable_grad():
        z = plain(*inputs)
        chosen = [t for t, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(z, chosen, dz, create_graph=True))
    return tuple(next(found) if want else None for want in wanted)

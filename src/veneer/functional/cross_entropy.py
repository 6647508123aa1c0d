"""Cross-entropy of a linear output head, a few rows of logits at a time: the N × V logits are never all there.

The gradients are made in the forward pass, while a chunk's logits are at hand. So each is multiplied by the head twice,
once for its logits and once for its gradient, and nothing of width V is kept. A vocabulary is the widest thing in a
small model: for 1,024 tokens and 49,152 words it saves 190 MiB and a quarter of the time.

Shapes: N rows (tokens with a label), D width, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 64 * 2**20}  # of logits at once: enough rows for a fast product, little beside the model
CHUNK_BYTES_ELSEWHERE = 256 * 2**20


def linear_cross_entropy(
    h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, labels_N: Tensor, *, chunk: int | None = None
) -> Tensor:
    """The sum over N rows of -log softmax(h Wᵀ + b)[label], in float32, or float64 for float64.

    labels_N  each from 0 to V - 1; there is no label to ignore
    chunk     rows of logits at once; None: as many as take 64 MiB, on an accelerator 256

    Equal to `plain_linear_cross_entropy`, which is what runs under torch.compile and autocast and for tensor
    subclasses. Can be differentiated twice.
    """
    ordinary = all(type(each) in (Tensor, torch.nn.Parameter) for each in (h_ND, W_VD, labels_N))
    if not ordinary or torch.compiler.is_compiling() or torch.is_autocast_enabled(h_ND.device.type):
        return plain_linear_cross_entropy(h_ND, W_VD, b_V, labels_N)
    rows = chunk or _rows_at_once(h_ND, W_VD)
    return _LinearCrossEntropy.apply(h_ND, W_VD, b_V, labels_N, rows, torch.is_grad_enabled())  # type: ignore


def plain_linear_cross_entropy(h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, labels_N: Tensor) -> Tensor:
    """The same, from all the logits at once."""
    z_NV = F.linear(h_ND, W_VD, b_V)
    return F.cross_entropy(z_NV.to(_accumulated(z_NV)), labels_N, reduction="sum")


def _rows_at_once(h_ND: Tensor, W_VD: Tensor) -> int:
    row = W_VD.shape[0] * _accumulated(h_ND).itemsize
    return max(1, CHUNK_BYTES.get(h_ND.device.type, CHUNK_BYTES_ELSEWHERE) // row)


def _accumulated(x: Tensor) -> torch.dtype:
    """The dtype that exponentials are summed in."""
    return torch.promote_types(x.dtype, torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    """Beside its plain twin above. Saves the gradients it makes, and its inputs for the case that those are wanted."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, labels_N: Tensor, chunk: int, learns: bool
    ) -> Tensor:
        h_, W_, b_ = (learns and needed for needed in ctx.needs_input_grad[:3])
        wide = _accumulated(h_ND)
        dh_ND = torch.empty_like(h_ND, memory_format=torch.contiguous_format) if h_ else None
        dW_VD = torch.zeros_like(W_VD, dtype=wide) if W_ else None
        db_V = torch.zeros(W_VD.shape[:1], dtype=wide, device=W_VD.device) if b_ else None
        loss = torch.zeros((), dtype=wide, device=h_ND.device)
        for start in range(0, len(h_ND), chunk):
            h_CD, labels_C = h_ND[start : start + chunk], labels_N[start : start + chunk]
            z_CV = F.linear(h_CD, W_VD, b_V)
            g_CV = z_CV.to(wide)
            loss += _softmax_less_label_(g_CV, labels_C)
            g_CV = z_CV if z_CV is g_CV else z_CV.copy_(g_CV)  # in the model's dtype, where the logits were
            if dh_ND is not None:
                torch.mm(g_CV, W_VD, out=dh_ND[start : start + chunk])
            if dW_VD is not None:
                dW_VD += g_CV.mT @ h_CD
            if db_V is not None:
                db_V += g_CV.sum(dim=0, dtype=wide)
        dW_VD = dW_VD if dW_VD is None else dW_VD.to(W_VD.dtype)
        db_V = db_V if db_V is None or b_V is None else db_V.to(b_V.dtype)
        ctx.save_for_backward(h_ND, W_VD, b_V, labels_N, dh_ND, dW_VD, db_V)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        h_ND, W_VD, b_V, labels_N, *made = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients are to be differentiated again
            made = _gradients(h_ND, W_VD, b_V, labels_N)
        wanted = zip(made, ctx.needs_input_grad[:3], strict=True)
        return *(d * g if needed and d is not None else None for d, needed in wanted), None, None, None


def _softmax_less_label_(z_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Make of logits, in place, the gradient of their cross-entropy: softmax minus one-hot. Returns the sum over C."""
    labels_C1 = labels_C[:, None]
    z_CV -= z_CV.amax(dim=1, keepdim=True)
    at_label_C1 = z_CV.gather(1, labels_C1)
    sum_C1 = z_CV.exp_().sum(dim=1, keepdim=True)
    z_CV /= sum_C1
    z_CV.scatter_add_(1, labels_C1, torch.full_like(at_label_C1, -1))
    return (sum_C1.log() - at_label_C1).sum()


def _gradients(h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, labels_N: Tensor) -> list[Tensor]:
    """The gradients to h, W and b by operations that can be differentiated."""
    z_NV = F.linear(h_ND, W_VD, b_V)
    p_NV = z_NV.to(_accumulated(z_NV)).softmax(dim=1)
    g_NV = (p_NV - F.one_hot(labels_N, p_NV.shape[1])).to(z_NV.dtype)
    return [g_NV @ W_VD, g_NV.mT @ h_ND, g_NV.sum(dim=0)]

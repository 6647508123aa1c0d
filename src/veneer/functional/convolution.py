"""LoRA on a convolution: A is a convolution like the layer's with R outputs, B one with a kernel of size one.

With groups, B is grouped like the layer while A sees all inputs (the file format of PEFT, and so its meaning).

Shapes: N rows of a batch or nothing, C channels in, O out, R rank, G groups, X one, two or three spatial dimensions,
K as many sizes of the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input, in the words of `torch.nn.Conv2d`.

    padding  a number for each dimension, "same" or "valid"
    mode     what the padding consists of: "zeros", "reflect", "replicate" or "circular"
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    mode: str = "zeros"

    def pads(self, kernel: Sequence[int]) -> list[int]:
        """The widths that are padded before and after each dimension, the last dimension first."""
        if self.padding == "valid":
            pairs = [(0, 0) for _ in kernel]
        elif self.padding == "same":
            totals = [step * (size - 1) for step, size in zip(self.dilation, kernel, strict=True)]
            pairs = [(total // 2, total - total // 2) for total in totals]
        else:
            pairs = [(int(width), int(width)) for width in self.padding]
        return [width for pair in reversed(pairs) for width in pair]


def convolve(x_NCX: Tensor, W_OCK: Tensor, window: Window, *, groups: int = 1) -> Tensor:
    """The convolution without a bias, of shape (N, O, X)."""
    convolution, padding = _CONVOLVE[W_OCK.dim() - 2], window.padding
    if window.mode != "zeros":
        x_NCX, padding = F.pad(x_NCX, window.pads(W_OCK.shape[2:]), mode=window.mode), 0
    return convolution(x_NCX, W_OCK, None, window.stride, padding, window.dilation, groups)


def update_convolution(
    x_NCX: Tensor, A_RCK: Tensor, B: Tensor, scale: float | Tensor, window: Window, *, groups: int = 1
) -> Tensor:
    """s · B ∗ (A ∗ x), of shape (N, O, X); B of shape (O, R/G, 1, ...)."""
    h_NRX = convolve(x_NCX, A_RCK, window) * scale
    return _CONVOLVE[B.dim() - 2](h_NRX, B, groups=groups)


def delta_convolution(A_RCK: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """The update as the weight of a convolution without groups, of shape (O, C, K); B of shape (O, R/G, 1, ...)."""
    groups = A_RCK.shape[0] // B.shape[1]
    thin_A, thin_B = A_RCK.reshape(groups, B.shape[1], -1), (B * scale).reshape(groups, -1, B.shape[1])
    return (thin_B @ thin_A).reshape(B.shape[0], *A_RCK.shape[1:])

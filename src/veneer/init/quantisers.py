"""What a weight becomes when it is quantised and read back, for LoftQ. Shapes: I in, O out.

NF4 and int8 are those of bitsandbytes, with which such a base is later loaded.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # weights that share one scale
_OFFSET = 0.9677083  # the outermost quantile of NormalFloat, as in QLoRA's code


def normal_float_values(bits: int) -> Tensor:
    """The 2^bits values of NormalFloat from −1 to 1, in float64: quantiles of a normal, 0 among them.

    Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3.
    """
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(_OFFSET, 0.5, count, dtype=torch.float64)[:-1])

    positive, negative = quantiles(half + 1), -quantiles(half)
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return values / values.max()


def normal_float(W_OI: Tensor, bits: int) -> Tensor:
    """W after NormalFloat in blocks of 64: each block over its largest magnitude, then to the nearest value."""
    values = normal_float_values(bits)
    edges = ((values[1:] + values[:-1]) / 2).to(W_OI)
    flat = W_OI.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = torch.bucketize(blocks / largest.masked_fill(largest == 0, 1.0), edges)
    return (values.to(W_OI)[nearest] * largest).flatten()[: len(flat)].view_as(W_OI)


def int8_rows(W_OI: Tensor) -> Tensor:
    """W after rounding to whole numbers from −127 to 127, one scale a row (Dettmers et al. 2022, arxiv 2208.07339)."""
    step = W_OI.abs().amax(dim=1, keepdim=True) / 127
    return (W_OI / step.masked_fill(step == 0, 1.0)).round() * step


QUANTISERS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda W_OI: normal_float(W_OI, 2),
    4: lambda W_OI: normal_float(W_OI, 4),
    8: int8_rows,
}

"""DoRA, weight-decomposed low-rank adaptation: W' = m · (W + sBA) / ‖W + sBA‖ by output row.

Liu et al. 2024, https://arxiv.org/abs/2402.09353. Shapes: I in, O out, R rank.
"""

import torch
from torch import Tensor


def row_norms(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """‖W + sBA‖ of each output row, of shape (O,), without gradient.

    The paper (section 4.3) treats the norm as a constant in the backward pass.
    """
    with torch.no_grad():
        return torch.linalg.vector_norm(torch.addmm(W_OI, B_OR, A_RI, alpha=scale), dim=1)


def gain(m_O: Tensor, norms_O: Tensor) -> Tensor:
    """What each output row is multiplied by: m / ‖W + sBA‖, of shape (O,). A row of zeros stays one, without 0 / 0."""
    return m_O / norms_O.masked_fill(norms_O == 0, 1.0)

"""Whether torch traces or transforms what is computed just now: autograd functions of our own are not made for that."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def is_transformed() -> bool:
    """Whether functions are traced or transformed here: by torch.compile, torch.func, torch.jit, or forward-mode AD."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is of no subclass, which may have a meaning of its own for an operation; None is."""
    return tensor is None or type(tensor) in _PLAIN

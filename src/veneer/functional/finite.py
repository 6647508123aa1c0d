"""Whether tensors hold NaN or infinity, found with one pass and one wait for the device, not one for each tensor.

A sum is finite only if every summand is: where sums are, nothing else need be looked at. A sum that is not may only be
too large, and then the tensor itself is looked through.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_SUMMED = (torch.float64, torch.float32, *_HALF)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return bool(tensor.dtype in _SUMMED and _sum(tensor).isfinite()) or bool(tensor.isfinite().all())


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity, in their order."""
    sums: dict[torch.device, dict[str, Tensor]] = {}
    suspects = set()
    for name, tensor in tensors.items():
        if tensor.dtype in _SUMMED:
            sums.setdefault(tensor.device, {})[name] = _sum(tensor)
        elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            suspects.add(name)
    for of_device in sums.values():
        finite = torch.stack(list(of_device.values())).isfinite().tolist()
        suspects |= {name for name, fine in zip(of_device, finite, strict=True) if not fine}
    return [name for name, tensor in tensors.items() if name in suspects and not tensor.isfinite().all()]


def _sum(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.sum() if tensor.dtype is torch.float64 else tensor.sum(dtype=torch.float32)

"""What others put around a model: `torch.compile` and data-parallel training."""

from collections.abc import Iterator
from typing import Any

from torch import nn

_INSIDE = ("_orig_mod", "module")


def inwards(model: Any) -> Iterator[nn.Module]:
    """The model and what each wrapper has inside, from the outermost in. Nothing if it is no module."""
    while isinstance(model, nn.Module):
        yield model
        model = next((model._modules[name] for name in _INSIDE if name in model._modules), None)

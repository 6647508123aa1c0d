"""Gradient checkpointing of a model with adapters: the recomputation uses the adapters of forward time."""

from typing import Any

from torch import nn

from veneer.layers.routed_checkpoint import RoutedCheckpoint
from veneer.layers.walk import modules_outside
from veneer.model.overlay import overlay_of

_ENABLE = "_set_gradient_checkpointing"  # where all of transformers' ways to switch it on end
_FUNCTION = "_gradient_checkpointing_func"


class EnableRouted:
    """A model's own way of switching checkpointing on while adapters lie over it: what it sets up follows the route."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Switch it on, or off, as the model's class does."""
        getattr(type(self.model), _ENABLE)(self.model, *args, **kwargs)
        protect_checkpointing(self.model)


def protect_checkpointing(model: nn.Module) -> None:
    """Let transformers' gradient checkpointing, on now or later, recompute on the route of forward time."""
    overlay = overlay_of(model)
    if overlay is None:
        return
    if hasattr(type(model), _ENABLE):
        vars(model)[_ENABLE] = EnableRouted(model)
    for _, module in modules_outside(model):
        function = vars(module).get(_FUNCTION)
        if function is not None and not isinstance(function, RoutedCheckpoint):
            vars(module)[_FUNCTION] = RoutedCheckpoint(function, overlay.route)


def unprotect_checkpointing(model: nn.Module) -> None:
    """Undo `protect_checkpointing`."""
    if isinstance(vars(model).get(_ENABLE), EnableRouted):
        del vars(model)[_ENABLE]
    for _, module in modules_outside(model):
        function = vars(module).get(_FUNCTION)
        if isinstance(function, RoutedCheckpoint):
            vars(module)[_FUNCTION] = function.checkpoint

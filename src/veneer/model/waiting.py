"""Adapters that wait for their data: an EVA adapter is made first and initialised afterwards.

Trained before, it would start as any other adapter does, and nobody would notice. So its model refuses to.
"""

from typing import Any

import torch
from torch import nn

from veneer.errors import AttachError
from veneer.model.overlay import Overlay, overlay_needed, overlay_of
from veneer.model.statistics import data_driven

_CALL = "call initialize_lora_eva_weights(model, dataloader) before training"


class RefuseTraining:
    """A forward pre-hook on a model with an adapter that waits. A class, so that it is copied and pickled with it."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Raise AttachError if this forward pass would train an adapter that waits."""
        overlay = overlay_of(model)
        if overlay is None or not (model.training and torch.is_grad_enabled()):
            return
        for name in overlay.route.acting:
            if name in overlay.waiting and overlay.trainable[name]:
                raise AttachError(
                    f"Adapter {name!r} has init_lora_weights='eva' and was not given its data, so it would be trained "
                    f"from an ordinary start: {_CALL}."
                )


def wait_for_data(model: nn.Module, name: str) -> None:
    """Note that an adapter waits, if its initialisation is one that comes later."""
    overlay = overlay_needed(model)
    if data_driven(overlay.configs[name]) != "eva":
        return
    overlay.waiting.add(name)
    if not any(isinstance(hook, RefuseTraining) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(RefuseTraining())


def stop_waiting(model: nn.Module, overlay: Overlay, name: str) -> None:
    """The adapter has its values, or is gone."""
    overlay.waiting.discard(name)
    if not overlay.waiting:
        ours = [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, RefuseTraining)]
        for key in ours:
            del model._forward_pre_hooks[key]

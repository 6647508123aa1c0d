"""What other libraries leave of adapters that they took off a model layer by layer."""

from torch import nn

from veneer.layers.merging import unmerge_here
from veneer.model.apply import activate, forget_adapter, one_at_a_time
from veneer.model.merge import merged_by_themselves
from veneer.model.overlay import Overlay, hang
from veneer.model.pretrained import release_saving


@one_at_a_time
def take_off_leftovers(model: nn.Module, overlay: Overlay) -> None:
    """Take off what is left of the adapters whose names are gone from `model.peft_config`: all, if that is gone.

    Weights that the whole model has adapters merged into stay as they are.
    """
    if "peft_config" not in vars(model):
        overlay.configs.clear()
        hang(model, overlay)
    if not overlay.configs:
        overlay.originals.clear()
        overlay.route.set(merged=())
    gone = [name for name in overlay.resolutions if name not in overlay.configs]
    for layer, names in merged_by_themselves(model, overlay):
        if set(names) & set(gone):
            unmerge_here(layer)
    for name in gone:
        forget_adapter(model, overlay, name)
    if not overlay.configs:
        release_saving(model)
        return
    activate(model, tuple(name for name in overlay.route.active if name in overlay.configs))

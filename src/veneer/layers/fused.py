"""Torch's transformer encoder: in evaluation it hands the weights of all its parts to one fused operator, which would
leave out their adapters. While one of its parts is adapted, it calls them instead.
"""

from torch import nn

from veneer.layers import swap
from veneer.layers.attach import Adapted
from veneer.layers.saved_module import is_saved
from veneer.layers.walk import modules_outside

FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


class Unfused(swap.Front):
    """Placed in front of an encoder or a layer of one: it calls its parts.

    Both properties are settings of torch's, which a property on the class hides: the instance keeps its own.
    """

    word = "Unfused"
    activation_relu_or_gelu = property(lambda self: 0)
    use_nested_tensor = property(lambda self: False)


def follow_adapters(model: nn.Module) -> None:
    """Let every encoder in the model call its parts if one of them is adapted, and fuse them if none is."""
    encoders = [module for _, module in modules_outside(model) if isinstance(module, FUSED)]
    for module in encoders:
        if is_saved(module):
            continue
        adapted = any(isinstance(part, Adapted) or is_saved(part) for _, part in modules_outside(module))
        if adapted and not isinstance(module, Unfused):
            swap.place(module, Unfused)
        elif not adapted and type(module) is swap.made_class(Unfused, swap.base_class(module)):
            swap.take_away(module)  # else it was sharded since, and calling its parts does no harm

"""What a kind of layer must say so that it can be adapted; `KINDS` is the table.

A kind is a handful of pure functions. To adapt a layer class of your own, register one:

    register_kind(MyLinear, Kind("my_linear", dims=..., update=..., ...))

Classes are looked up by name along the method resolution order, so nothing is imported to recognise a layer.
"""

from functools import lru_cache

from torch import nn

from veneer.errors import check_kind
from veneer.layers.kinds.convolution import CONV1D, CONV2D, CONV3D
from veneer.layers.kinds.embedding import EMBEDDING
from veneer.layers.kinds.kind import Kind, Layer, Number, Shape
from veneer.layers.kinds.linear import LINEAR
from veneer.layers.kinds.packed import PACKED, PACKED_CLASSES
from veneer.layers.kinds.parameter import ATTENTION, Stack, parameter_kind
from veneer.layers.kinds.transposed import TRANSPOSED

KINDS: dict[str, Kind] = {
    "torch.nn.modules.linear.Linear": LINEAR,
    "torch.nn.modules.sparse.Embedding": EMBEDDING,
    "torch.nn.modules.activation.MultiheadAttention": ATTENTION,
    "torch.nn.modules.conv.Conv1d": CONV1D,
    "torch.nn.modules.conv.Conv2d": CONV2D,
    "torch.nn.modules.conv.Conv3d": CONV3D,
    "transformers.pytorch_utils.Conv1D": TRANSPOSED,
    **dict.fromkeys(PACKED_CLASSES, PACKED),
}


def class_name(cls: type) -> str:
    """The name a class is registered under, `module.QualifiedName`."""
    return f"{cls.__module__}.{cls.__qualname__}"


@lru_cache(maxsize=1024)
def class_names(cls: type) -> tuple[str, ...]:
    """The names of a class and of all it derives from, in the method resolution order."""
    return tuple(map(class_name, cls.__mro__))


def register_kind(cls: type[nn.Module], kind: Kind) -> None:
    """Make layers of class `cls` (and its subclasses) adaptable. Raises ArgumentError for anything else."""
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        check_kind(cls, (), "A class of torch modules")
    check_kind(kind, Kind, "A veneer.Kind")
    KINDS[class_name(cls)] = kind


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer, or None if no class it derives from is registered."""
    for name in class_names(type(layer)):
        if name in KINDS:
            return KINDS[name]
    return None


__all__ = [
    "ATTENTION",
    "CONV1D",
    "CONV2D",
    "CONV3D",
    "EMBEDDING",
    "KINDS",
    "LINEAR",
    "PACKED",
    "TRANSPOSED",
    "Kind",
    "Layer",
    "Number",
    "Shape",
    "Stack",
    "class_name",
    "class_names",
    "kind_of",
    "parameter_kind",
    "register_kind",
]

"""Where a layer's weight is kept and how it is read and written; `STORES` is the table."""

import torch
from torch import Tensor, nn

from veneer.errors import MergeError
from veneer.layers.kinds import Layer
from veneer.layers.weights import offloaded
from veneer.layers.weights.bitsandbytes import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT
from veneer.layers.weights.dense import DENSE
from veneer.layers.weights.offloaded import OFFLOADED, Elsewhere, is_offloaded
from veneer.layers.weights.store import Store

STORES: tuple[Store, ...] = (OFFLOADED, DENSE, BITSANDBYTES_8BIT, BITSANDBYTES_4BIT)


def store_of(layer: Layer, parameter: str = "weight") -> Store:
    """The store that knows this weight of the layer. Raises MergeError if none does."""
    for store in STORES:
        if store.holds(layer, parameter):
            return store
    raise MergeError(
        f"The weight of a {type(layer).__name__} is not a plain tensor of floating-point numbers (it is quantised, or "
        "computed from others), so it cannot be read or merged yet. Plain LoRA over it works; for DoRA or a merge load "
        "the base in float32, bfloat16 or float16."
    )


def home(layer: Layer, parameter: str = "weight") -> torch.device:
    """The device on which the layer computes: where its adapters belong."""
    if is_offloaded(layer, parameter):
        return offloaded.execution_device(layer)
    return stored(layer, parameter).device


def stored(layer: Layer, parameter: str = "weight") -> Tensor:
    """The weight as the layer keeps it, quantised or not, without any adapter."""
    registered = layer._parameters.get(parameter)
    return getattr(layer, parameter) if registered is None else registered


def read(layer: Layer, parameter: str = "weight") -> Tensor:
    """A weight of the layer as a floating-point tensor, as the layer itself uses it."""
    return store_of(layer, parameter).read(layer, parameter)


def check_writable(layer: Layer, parameter: str, what: str) -> None:
    """Raise MergeError if the weight can only be read; `what` is what the error calls the layer."""
    if store_of(layer, parameter).write is None:
        kept_as = type(layer._parameters[parameter]).__name__
        raise MergeError(
            f"The weight of {what} is quantised ({kept_as}), and rounding it again would lose part of the adapter. "
            "Load the base unquantised (in bfloat16, say), load the adapter on it, and merge there."
        )


def write(layer: Layer, parameter: str, W: Tensor) -> None:
    """Put a weight in place of the layer's own, which stays where it was kept. Its store must be able to write."""
    store = store_of(layer, parameter)
    assert store.write is not None
    store.write(layer, parameter, W)


def kept(layer: Layer, parameter: str = "weight") -> nn.Parameter | Elsewhere:
    """What `put_back` needs to undo a `write`."""
    return offloaded.elsewhere(layer, parameter) if is_offloaded(layer, parameter) else layer._parameters[parameter]


def put_back(layer: Layer, parameter: str, original: nn.Parameter | Elsewhere) -> None:
    """Undo a `write`. The model may have been moved, cast, offloaded or brought back since."""
    if is_offloaded(layer, parameter):
        if isinstance(original, Elsewhere):
            offloaded.put_back(layer, parameter, original)
        else:
            write(layer, parameter, original)
        return
    written = stored(layer, parameter)
    if isinstance(original, Elsewhere):
        original = nn.Parameter(original.read().detach(), requires_grad=False)
    if (original.dtype, original.device) != (written.dtype, written.device):
        original.data = original.data.to(written.device, written.dtype)
    layer._parameters[parameter] = original


__all__ = [
    "STORES",
    "Elsewhere",
    "Store",
    "check_writable",
    "home",
    "is_offloaded",
    "kept",
    "put_back",
    "read",
    "store_of",
    "stored",
    "write",
]

"""Where a layer's weight is kept and how it is read and written; `STORES` is the table."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.errors import MergeError
from veneer.layers.kinds import PACKED, Layer, kind_of
from veneer.layers.weights import offloaded
from veneer.layers.weights.bitsandbytes import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT, keep_order
from veneer.layers.weights.dense import DENSE
from veneer.layers.weights.hqq import HQQ
from veneer.layers.weights.offloaded import OFFLOADED, Elsewhere, is_offloaded
from veneer.layers.weights.quanto import QUANTO
from veneer.layers.weights.rounding import Loss, loss_of
from veneer.layers.weights.store import Store
from veneer.layers.weights.torchao import TORCHAO, TORCHAO_TO_READ, rounds_inputs

STORES: tuple[Store, ...] = (
    OFFLOADED,
    DENSE,
    BITSANDBYTES_8BIT,
    BITSANDBYTES_4BIT,
    TORCHAO,
    TORCHAO_TO_READ,
    QUANTO,
    HQQ,
)


def store_of(layer: Layer, parameter: str = "weight") -> Store:
    """The store that knows this weight of the layer. Raises MergeError if none does."""
    for store in STORES:
        if store.holds(layer, parameter):
            return store
    if (kept := layer._parameters.get(parameter)) is not None and kept.is_meta:
        raise MergeError(
            f"The weight of a {type(layer).__name__} has no value here just now (it is on the meta device, or "
            "quantised and offloaded), so it cannot be read or merged. Load the model such that it stays on a device."
        )
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
    """The weight as the layer keeps it, quantised or not, without any adapter; of a packed layer, a part of it."""
    registered = layer._parameters.get(parameter)
    if registered is None and kind_of(layer) is PACKED:
        return next(tensor for tensor in (*layer._buffers.values(), *layer._parameters.values()) if tensor is not None)
    return getattr(layer, parameter) if registered is None else registered


def read(layer: Layer, parameter: str = "weight") -> Tensor:
    """A weight of the layer as a floating-point tensor, as the layer itself uses it."""
    return store_of(layer, parameter).read(layer, parameter)


def reader(layer: Layer, parameter: str = "weight") -> Callable[[], Tensor]:
    """A function that reads the quantised weight of now, also after another has taken its place."""
    weight, store = layer._parameters.get(parameter), store_of(layer, parameter)

    def read_now() -> Tensor:
        if weight is None or layer._parameters.get(parameter) is weight:
            return store.read(layer, parameter)
        assert store.value is not None
        return store.value(weight)

    return read_now


def is_quantised(layer: Layer, parameter: str = "weight") -> bool:
    """Whether the weight is kept in few bits, so that what is written would be rounded."""
    return any(store.is_quantised and store.holds(layer, parameter) for store in STORES)


def check_writable(layer: Layer, parameter: str, what: str, *, requantize: bool = False) -> None:
    """Raise MergeError if the weight can only be read, or may not be rounded again; `what` names the layer.

    requantize  whether it may
    """
    store = store_of(layer, parameter)
    if not store.is_quantised or (requantize and store.quantise is not None):
        return
    kept_as = type(stored(layer, parameter)).__name__ if parameter in layer._parameters else store.name
    problem = f"The weight of {what} is quantised ({kept_as}), and rounding it again would lose part of the adapter. "
    remedy = "Load the base unquantised (in bfloat16, say), load the adapter on it, and merge there"
    if store.quantise is None:
        raise MergeError(f"{problem}{remedy}; weights of this form can be read, not made.")
    raise MergeError(
        f"{problem}{remedy}; or pass requantize=True to the model's merge_adapter or merge_and_unload, and be told how "
        "much is lost."
    )


def quantised(layer: Layer, parameter: str, W: Tensor) -> tuple[nn.Parameter, Loss]:
    """A weight rounded to what the layer keeps its own in, ready for `write`, and what that costs. Changes nothing."""
    store = store_of(layer, parameter)
    assert store.quantise is not None
    assert store.value is not None
    rounded = store.quantise(layer, parameter, W)
    return rounded, loss_of(store.read(layer, parameter), W, store.value(rounded))


def write(layer: Layer, parameter: str, W: Tensor) -> None:
    """Put a weight in place of the layer's own, which stays where it was kept. Its store must be able to write.

    Where the weight is quantised, `W` is a parameter that `quantised` has made, or that the layer had before.
    """
    store = store_of(layer, parameter)
    assert store.write is not None
    assert not store.is_quantised or type(W) is type(layer._parameters[parameter])
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
    moved = (original.dtype, original.device) != (written.dtype, written.device)
    if is_quantised(layer, parameter):
        write(layer, parameter, _moved(original, written) if moved else original)
        return
    if moved:
        original.data = original.data.to(written.device, written.dtype)
    layer._parameters[parameter] = original


def _moved(original: nn.Parameter, written: Tensor) -> nn.Parameter:
    """A quantised weight where another is, with all that belongs to it."""
    there = (
        original.to(written.device) if original.dtype == written.dtype else original.to(written.device, written.dtype)
    )
    return there if isinstance(there, nn.Parameter) else nn.Parameter(there, requires_grad=False)


__all__ = [
    "STORES",
    "Elsewhere",
    "Loss",
    "Store",
    "check_writable",
    "home",
    "is_offloaded",
    "is_quantised",
    "keep_order",
    "kept",
    "put_back",
    "quantised",
    "read",
    "reader",
    "rounds_inputs",
    "store_of",
    "stored",
    "write",
]

"""The shape of a table entry: what Veneer must know about a kind of layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# A layer: an `nn.Module` with the attributes of its kind, which no one type in torch describes.
Layer = Any


def _nothing_to_refuse(layer: Layer) -> str | None:
    return None


@dataclass(frozen=True)
class Kind:
    """One kind of layer. All members are pure functions; shapes: I in, O out, R rank.

    name          what previews and errors call it
    dims          (layer) -> (O, I)
    update        (layer, x, A, B, scale, p) -> s·BA·drop(x), shaped like the layer's output
    base_update   (layer, x, y, A, B, scale, p) -> (W·drop(x) without bias, s·BA·drop(x)); y is the layer's output
    to_matrix     (W) -> the weight as an (O, I) matrix; a view
    from_matrix   its inverse
    inits         what `init_lora_weights` True and False mean for this kind, as names of initialisers
    linear        whether "all-linear" includes it
    fan_in_fan_out  whether the weight is stored as (I, O); only a note for readers of the adapter's config
    on_disk       how the factors are called in an adapter file
    refuse        (layer) -> why this very layer cannot be adapted, or None
    """

    name: str
    dims: Callable[[Layer], tuple[int, int]]
    update: Callable[[Layer, Tensor, Tensor, Tensor, float, float], Tensor]
    base_update: Callable[[Layer, Tensor, Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]
    inits: dict[bool, str]
    linear: bool
    fan_in_fan_out: bool = False
    on_disk: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    refuse: Callable[[Layer], str | None] = _nothing_to_refuse

"""Weights that HQQ keeps in few bits, in layers of its own. They can be read; nothing here makes them."""

import torch
from torch import Tensor

from veneer.layers.kinds import Layer, class_names
from veneer.layers.kinds.packed import HQQ_LINEAR
from veneer.layers.weights.store import Store


def _holds(layer: Layer, parameter: str) -> bool:
    return parameter == "weight" and HQQ_LINEAR in class_names(type(layer)) and not layer.W_q.is_meta


def _read(layer: Layer, parameter: str) -> Tensor:
    """The (O, I) weight in the dtype that the layer computes in."""
    with torch.no_grad():
        return layer.dequantize()


HQQ = Store("hqq", _holds, _read, None, is_quantised=True)

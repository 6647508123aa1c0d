"""Quantised weights in shards: which can be cut, and what their layers must know for that."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from veneer.layers.weights import keep_order

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def why_not_shards(model: nn.Module) -> Iterator[str]:
    """Each weight that cannot be cut into shards, and what to do about that."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            yield f"{name} is a single number without dimensions: make it a tensor of shape (1,)"
        if _is_4bit(parameter):
            if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
                yield f"{name} was reordered by an evaluation on a CPU: load the base anew, and shard it before that"
        elif type(parameter) is not nn.Parameter or parameter.dtype not in _FLOATS:
            yield (
                f"{name} is quantised ({type(parameter).__name__}, {parameter.dtype}), and its scales would not go "
                "with its shards: quantise to 4 bits by bitsandbytes, shard the base in bfloat16, or use "
                "DistributedDataParallel, where each device has all of it"
            )


def prepare_shards(model: nn.Module) -> None:
    """Let layers in 4 bits find their scales, which stay whole on each rank, when their weight is gathered.

    bitsandbytes looks for them on the layer. On some CPUs it would also reorder the weight in the first evaluation,
    which a weight that is gathered anew each time does not survive.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and _is_4bit(weight):
            layer: Any = module
            layer.quant_state = layer.weight.quant_state
            keep_order(module)


def _is_4bit(parameter: Any) -> bool:
    return type(parameter).__name__ == "Params4bit"

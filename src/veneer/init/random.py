"""Initialisations that look at nothing but the shape. Shapes: I in, O out, R rank."""

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer.init.factors import Factors, Weight


def kaiming(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """A as `torch.nn.Linear` starts its weight, B zero: the update starts at exactly zero (LoRA's reference code)."""
    A_RI, B_OR = _empty(weight, rank, generator)
    nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5), generator=generator)
    return Factors(A_RI, nn.init.zeros_(B_OR))


def kaiming_both(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """A and B both random: the update starts different from zero, which is useful in tests and little else."""
    A_RI, B_OR = _empty(weight, rank, generator)
    nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5), generator=generator)
    nn.init.kaiming_uniform_(B_OR, a=math.sqrt(5), generator=generator)
    return Factors(A_RI, B_OR)


def gaussian(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """A normal with standard deviation 1/r, B zero (the choice of diffusers' training scripts)."""
    A_RI, B_OR = _empty(weight, rank, generator)
    nn.init.normal_(A_RI, std=1 / rank, generator=generator)
    return Factors(A_RI, nn.init.zeros_(B_OR))


def embedding_default(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """For an embedding: A zero, B standard normal, as `torch.nn.Embedding` starts (LoRA's reference code)."""
    A_RI, B_OR = _empty(weight, rank, generator)
    nn.init.normal_(B_OR, generator=generator)
    return Factors(nn.init.zeros_(A_RI), B_OR)


def normal_both(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: Any = None,
    stats: Any = None,
    generator: Generator | None = None,
) -> Factors:
    """For an embedding: A and B both standard normal, so that the update starts different from zero."""
    A_RI, B_OR = _empty(weight, rank, generator)
    return Factors(nn.init.normal_(A_RI, generator=generator), nn.init.normal_(B_OR, generator=generator))


def _empty(weight: Weight, rank: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Where the generator is, so that a seed gives the same numbers for a model on any device."""
    place = {"device": weight.device if generator is None else generator.device, "dtype": torch.float32}
    columns = rank // weight.groups
    return torch.empty(rank, weight.in_features, **place), torch.empty(weight.out_features, columns, **place)

"""Dropout that is kept as a seed: which elements are dropped is drawn again where a backward pass needs it.

A mask costs a draw and a byte for every element; these places cost what p of them cost.
"""

import math

import torch
from torch import Tensor


def new_seed() -> int:
    """A seed from torch's default generator, so that `torch.manual_seed` and checkpointing repeat what follows."""
    return int(torch.randint(2**62, ()).item())


def dropped_places(count: int, p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices below `count` such that each is among them with probability p, independently of all others.

    Some come more than once, and in any order. Points are strewn evenly over the indices, as many as a Poisson variable
    says whose mean is -log(1 - p) for each index: so the points of each index are Poisson variables too, independent,
    and none at all with probability 1 - p (Kingman, Poisson Processes, 1993, section 5.1).
    """
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor(-math.log1p(-p) * count, dtype=torch.float64)
    points = int(torch.poisson(mean, generator=generator).item())
    if torch.device(device).type != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
    where = torch.rand(points, dtype=torch.float64, device=device, generator=generator)
    return where.mul_(count).long().clamp_(max=count - 1)  # the product may round up to `count`


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x with zeros at the dropped places, not scaled up by 1 / (1 - p): that is cheaper on what is made of it."""
    places = dropped_places(x.numel(), p, seed, x.device)
    return x.flatten().index_fill(0, places, 0).view(x.shape)

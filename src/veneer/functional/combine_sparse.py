"""What is kept of each adapter before it is added to others, and how those that disagree on a sign are joined.

TIES: Yadav et al. 2023, https://arxiv.org/abs/2306.01708. DARE: Yu et al. 2023, https://arxiv.org/abs/2311.03099.
Everything works value by value on tensors of one shape, be they factors or whole updates.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def kept(density: float, count: int) -> int:
    """How many of `count` values pruning by magnitude keeps: density · count, rounded down."""
    return int(density * count)


def keep_all(t: Tensor, density: float, generator: Generator | None) -> Tensor:
    """No pruning."""
    return t


def keep_largest(t: Tensor, density: float, generator: Generator | None) -> Tensor:
    """Zero all but the largest absolute values, of which a fraction `density` is kept."""
    if density == 1:
        return t
    largest = t.abs().flatten().topk(kept(density, t.numel())).indices
    pruned = torch.zeros_like(t).flatten()
    pruned[largest] = t.flatten()[largest]
    return pruned.view(t.shape)


def keep_at_random(t: Tensor, density: float, generator: Generator | None) -> Tensor:
    """Keep each value with probability `density` and divide it by `density`, so that the mean stays; zero the rest."""
    if density == 1:
        return t
    return t * torch.bernoulli(torch.full_like(t, density), generator=generator) / density


def add(tensors: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """Σ wᵢ tᵢ (task arithmetic, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089)."""
    total = torch.zeros_like(tensors[0])
    for t, weight in zip(tensors, weights, strict=True):
        total += t * weight
    return total


def elected_signs(tensors: Sequence[Tensor], majority: str) -> Tensor:
    """+1 or -1 for each value: the sign of the sum ("total") or of the majority ("frequency"); a draw is +1.

    The vote is on the tensors as they are: weights count only afterwards.
    """
    votes = torch.zeros_like(tensors[0])
    for t in tensors:
        votes += t.sign() if majority == "frequency" else t
    return torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)


def add_agreeing(tensors: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """Σ wᵢ tᵢ over the tensors whose value has the elected sign, divided by how many these are (0 where none)."""
    elected = elected_signs(tensors, majority)
    total, voters = torch.zeros_like(elected), torch.zeros_like(elected)
    for t, weight in zip(tensors, weights, strict=True):
        agrees = t.sign() == elected
        total += torch.where(agrees, t * weight, 0.0)
        voters += agrees
    return total / voters.clamp(min=1)

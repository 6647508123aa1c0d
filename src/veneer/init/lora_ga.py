"""LoRA-GA: the first step of the adapter goes where the first step of full training would. Shapes: I in, O out, R rank.

Wang, Yu and Li 2024, https://arxiv.org/abs/2407.05000.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from veneer.config.sub_configs import LoraGAConfig
from veneer.errors import ConfigError
from veneer.functional.svd import randomized_svd
from veneer.init.checks import finite, matrix_of, most, shaped
from veneer.init.factors import Factors, Weight

_NITER = 4


def lora_ga(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: LoraGAConfig | Mapping[str, Any] | None = None,
    stats: Tensor | None = None,
    generator: Generator | None = None,
) -> Factors:
    """A and B from the 2R leading singular vectors of the gradient, B times their singular values; taken off the base.

    stats  the gradient of the loss with respect to the weight, of shape (O, I), averaged over some batches

    Raises ConfigError if the gradient has fewer than 2R singular values or cannot be used.
    """
    if stats is None:
        raise ConfigError("'lora_ga' starts from gradients of the weights: measure them and give them as `stats`.")
    settings = LoraGAConfig.of(options)
    shape = (weight.out_features, weight.in_features)
    most(rank, min(shape) // 2, f"it needs twice as many of the {min(shape)} singular values of {shape}", "lora_ga")
    shaped(stats, shape, "a gradient", "lora_ga")
    G_OI = finite(stats, "the gradient of the weight", "lora_ga").to(weight.device)
    if not G_OI.any():
        raise ConfigError("'lora_ga' cannot start: the gradient of this layer is zero. Is it used on this data?")
    U, S, Vh = randomized_svd(G_OI, min(4 * rank, *shape), niter=_NITER, generator=generator)
    for_A, for_B = _share(settings.direction, rank, generator, weight.device)
    A_RI, B_OR, S_R = Vh[for_A], U[:, for_B] * S[for_B], S[for_B]
    match settings.scale:
        case "stable":
            B_OR = B_OR * (weight.out_features**0.25 / settings.stable_gamma**0.5)
        case "weight_svd":
            B_OR = B_OR * _size_ratio(matrix_of(weight, "lora_ga"), S_R, rank, generator)
        case "gd_scale":
            A_RI, B_OR = A_RI / scale, B_OR / scale
    return Factors(A_RI, B_OR, subtract=True)


def _share(direction: str, rank: int, generator: Generator | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the 2R components go to A and which to B."""
    both = torch.arange(2 * rank, device=device)
    match direction:
        case "ArBr":
            return both[1::2], both[0::2]
        case "A2rBr":
            return both[rank:], both[:rank]
        case "ArB2r":
            return both[:rank], both[rank:]
    where = device if generator is None else generator.device
    drawn = torch.randperm(2 * rank, device=where, generator=generator)[:rank].to(device)
    return drawn, drawn


def _size_ratio(W_OI: Tensor, S_R: Tensor, rank: int, generator: Generator | None) -> Tensor | float:
    """What makes B's first component as large as the weight's largest; 1 if it is zero."""
    largest = randomized_svd(W_OI, rank, niter=_NITER, generator=generator)[1][0]
    return largest / S_R[0] if S_R[0] > 0 else 1.0

"""What an initialiser may rely on: a matrix with finite values, and a rank that it can have. Shapes: I in, O out."""

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.init.factors import Weight


def matrix_of(weight: Weight, method: str) -> Tensor:
    """The values of the weight, of shape (O, I), in float32 or better. Raises ConfigError if they cannot be used."""
    W_OI = weight.read().detach()
    assert W_OI.shape == (weight.out_features, weight.in_features)
    if W_OI.is_meta:
        raise ConfigError(f"{method!r} starts from the values of the weights: load them before adding the adapter.")
    return finite(W_OI, "the weight", method)


def finite(X: Tensor, what: str, method: str) -> Tensor:
    """X in float32 or better. Raises ConfigError if it holds NaN, infinity or no real numbers."""
    if not X.is_floating_point():
        raise ConfigError(f"{method!r} needs real numbers, but {what} is {X.dtype}: dequantise it first.")
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    if not torch.isfinite(X).all():
        raise ConfigError(f"{method!r} cannot start: there is NaN or infinity in {what}. Check where it comes from.")
    return X


def most(rank: int, limit: int, why: str, method: str) -> None:
    """Raise ConfigError if the rank is above the limit."""
    if rank > limit:
        raise ConfigError(
            f"{method!r} cannot have rank {rank} here: {why}, so at most {limit}. "
            "Lower r, or give this layer a smaller one in rank_pattern."
        )


def most_singular_values(rank: int, weight: Weight, method: str) -> None:
    """Raise ConfigError if the weight has fewer singular values than the rank."""
    shape = (weight.out_features, weight.in_features)
    most(rank, min(shape), f"a weight of shape {shape} has {min(shape)} singular values", method)


def shaped(X: Tensor, shape: tuple[int, ...], what: str, method: str) -> None:
    """Raise ConfigError if a statistic is not of the shape that goes with the weight."""
    if tuple(X.shape) != shape:
        raise ConfigError(
            f"{method!r} needs {what} of shape {shape} for this layer, not {tuple(X.shape)}: "
            "measure it on this layer of this model."
        )

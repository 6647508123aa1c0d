"""The covariance of a layer's inputs, for CorDA. Shapes: N rows, I in."""

import torch
from torch import Tensor

from veneer.errors import ConfigError


class Covariance:
    """The mean of XᵀX over samples, each divided by its largest input first, as CorDA's code does.

    float16  keep the mean in half precision: half the memory, three digits. It is computed in float32 all the same.
    """

    def __init__(self, features: int, *, float16: bool = False, device: torch.device | str = "cpu") -> None:
        self.samples = 0
        self._mean_II = torch.zeros(
            features, features, dtype=torch.float16 if float16 else torch.float32, device=device
        )

    @torch.no_grad()
    def update(self, X: Tensor) -> None:
        """Take in the inputs of one sample, of shape (..., I). Samples of one batch count singly: give them one by one.

        Raises ConfigError if the features are others, or if a value is not finite.
        """
        X_NI = X.reshape(-1, X.shape[-1]).float()
        if X_NI.shape[1] != len(self._mean_II):
            raise ConfigError(f"These inputs have {X_NI.shape[1]} features, {len(self._mean_II)} were expected.")
        if not torch.isfinite(X_NI).all():
            raise ConfigError("Some inputs are NaN or infinity. Check the data, and the model's dtype.")
        if not len(X_NI):
            raise ConfigError("This sample has no inputs at all. Leave empty samples out.")
        largest = X_NI.max().abs()
        if largest == 0:  # nothing but zeros and negative values
            largest = X_NI.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        X_NI = X_NI / largest
        self.samples += 1
        # A running mean, not a sum: a sum would leave float16's range.
        mean_II = self._mean_II.float()
        new_II = (X_NI.T @ X_NI).to(mean_II.device)
        self._mean_II.copy_(mean_II.add_(new_II.sub_(mean_II), alpha=1 / self.samples))

    def mean(self) -> Tensor:
        """The covariance, of shape (I, I), in float32. Raises ConfigError if no sample came."""
        if not self.samples:
            raise ConfigError("No inputs were seen: the data never reached this layer.")
        return self._mean_II.float()

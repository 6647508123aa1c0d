"""The gradient of a weight, averaged over batches, for LoRA-GA. Shapes: I in, O out."""

import torch
from torch import Tensor

from veneer.errors import ConfigError


class MeanGradient:
    """The mean of the gradients of one weight of shape (O, I), in float32."""

    def __init__(self, out_features: int, in_features: int, *, device: torch.device | str = "cpu") -> None:
        self.batches = 0
        self._sum_OI = torch.zeros(out_features, in_features, device=device, dtype=torch.float32)

    @torch.no_grad()
    def update(self, gradient_OI: Tensor) -> None:
        """Take in the gradient of one batch. Raises ConfigError if the shape is another, or a value is not finite."""
        if gradient_OI.shape != self._sum_OI.shape:
            raise ConfigError(f"The gradient has shape {tuple(gradient_OI.shape)}, not {tuple(self._sum_OI.shape)}.")
        if not torch.isfinite(gradient_OI).all():
            raise ConfigError("A gradient is NaN or infinity. Check the data, the loss and the model's dtype.")
        self._sum_OI += gradient_OI.to(self._sum_OI)
        self.batches += 1

    def mean(self) -> Tensor:
        """The mean gradient, of shape (O, I). Raises ConfigError if no gradient came."""
        if not self.batches:
            raise ConfigError("No gradient was seen: the loss does not depend on this layer.")
        return self._sum_OI / self.batches

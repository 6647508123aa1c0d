"""Biases trained beside an adapter (`bias="all"` or `"lora_only"`).

They are trained in place, under their own names; the originals are kept, so that disabling or removing the adapter
gives the base model back exactly.
"""

from collections.abc import Mapping

from torch import Tensor, nn


class TrainedBiases:
    """The biases one adapter trains: parameters by name, and the values they do not have at the moment.

    acting  whether the parameters hold the trained values; otherwise they hold the original ones
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.acting = True
        self._other = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def act(self, acting: bool, *, trainable: bool) -> None:
        """Put the trained values in place, or the original ones, and let them get gradients or not."""
        for name, parameter in self.parameters.items():
            if acting != self.acting:
                incoming = self._other[name].to(parameter.device, parameter.dtype)
                self._other[name] = parameter.data
                parameter.data = incoming
            parameter.requires_grad_(trainable)
        self.acting = acting

    def trained(self) -> dict[str, Tensor]:
        """The trained values by parameter name."""
        if self.acting:
            return {name: parameter.detach() for name, parameter in self.parameters.items()}
        return dict(self._other)

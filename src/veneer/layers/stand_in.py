"""Parameters of the base that have other values while an adapter acts: biases it trains (`bias="all"` or
`"lora_only"`), weights it replaced at the start (LoftQ).

They are changed in place, under their own names; the originals are kept, so that disabling or removing the adapter
gives the base model back exactly.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn


class StandIns:
    """The parameters concerned, by their names in the model, and the values they do not have at the moment.

    acting  whether the model holds the adapter's values; otherwise it holds the original ones

    One parameter may have several names, where a model shares it.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], values: Mapping[str, Tensor] | None = None) -> None:
        """Start acting, with `values` by the first name of each parameter, or with the base's own."""
        self.names = tuple(names)
        self.acting = True
        self._other: dict[str, Tensor] = {}
        for name, parameter, _ in self._parameters(model):
            self._other[name] = parameter.detach().clone() if values is None else parameter.data
            if values is not None:
                parameter.data = values[name].to(parameter.device, parameter.dtype)

    def act(self, model: nn.Module, acting: bool, *, trainable: bool) -> None:
        """Put the adapter's values in place, or the original ones, and let them get gradients or not."""
        for name, parameter, _ in self._parameters(model):
            if acting != self.acting:
                incoming = self._other[name].to(parameter.device, parameter.dtype)
                self._other[name] = parameter.data
                parameter.data = incoming
            parameter.requires_grad_(trainable)
        self.acting = acting

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's values by every name: the tensors themselves, not copies."""
        return {
            name: parameter.detach() if self.acting else self._other[first]
            for first, parameter, names in self._parameters(model)
            for name in names
        }

    def _parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[str]]]:
        """(first name, parameter, all its names) of each parameter."""
        names: dict[int, list[str]] = {}
        found: dict[int, nn.Parameter] = {}
        for name in self.names:
            parameter = model.get_parameter(name)
            names.setdefault(id(parameter), []).append(name)
            found[id(parameter)] = parameter
        for key, parameter in found.items():
            yield names[key][0], parameter, names[key]

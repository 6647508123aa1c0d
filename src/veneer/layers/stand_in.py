"""Parameters of the base that have other values while an adapter acts: biases it trains (`bias="all"` or
`"lora_only"`), weights it replaced at the start (LoftQ).

They keep their names; the originals are kept, so that disabling or removing the adapter gives the base model back
exactly. Biases change in place, as an optimizer holds them. Weights are other parameters: a backward pass of a forward
before the change needs the ones that it saw.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from veneer.errors import AttachError
from veneer.layers.kinds import Layer
from veneer.layers.sharded import is_sharded, reshard


class StandIns:
    """The parameters concerned, by their names in the model, and the values they do not have at the moment.

    acting  whether the model holds the adapter's values; otherwise it holds the original ones

    One parameter may have several names, where a model shares it.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], values: Mapping[str, Tensor] | None = None) -> None:
        """Start acting, with `values` by the first name of each parameter, or with the base's own."""
        self.names = tuple(names)
        self.acting = True
        self.in_place = values is None
        self._other: dict[str, Tensor] = {}
        for name, parameter, _ in self._parameters(model):
            self._other[name] = parameter.detach().clone() if values is None else parameter
            if values is not None:
                value = values[name].to(parameter.device, parameter.dtype)
                _replace(model, parameter, nn.Parameter(value, requires_grad=False))

    def act(self, model: nn.Module, acting: bool, *, trainable: bool) -> None:
        """Put the adapter's values in place, or the original ones, and let them get gradients or not."""
        for name, parameter, _ in self._parameters(model):
            if acting != self.acting:
                parameter = self._exchange(model, name, parameter)
            parameter.requires_grad_(trainable)
        self.acting = acting

    def _exchange(self, model: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """Put the values that are kept in place of those that are there; returns the parameter that has them."""
        reshard(model)
        if is_sharded(model.get_parameter(name)):
            raise AttachError(
                f"The adapter has its own values of {name}, a weight of the base, and these cannot be exchanged while "
                "the model is sharded: such an adapter acts all the time."
            )
        incoming = self._other[name]
        if self.in_place:
            self._other[name] = parameter.data
            parameter.data = incoming.to(parameter.device, parameter.dtype)
            return parameter
        assert isinstance(incoming, nn.Parameter)
        if (incoming.dtype, incoming.device) != (parameter.dtype, parameter.device):  # the model was moved or cast
            incoming.data = incoming.data.to(parameter.device, parameter.dtype)
        self._other[name] = parameter
        _replace(model, parameter, incoming)
        return incoming

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's values by every name: the tensors themselves, not copies."""
        return {
            name: parameter if self.acting else self._other[first]
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


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in place of another, in every module that has it."""
    module: Layer
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new

"""The names that PEFT's layers have for the scales and the parts of their adapters."""

from typing import Any

from torch import Tensor

from veneer.errors import ArgumentError, MergeError
from veneer.layers.adapter import Adapter, checked_factor
from veneer.layers.factor_views import VIEWS, ByName, View
from veneer.layers.kinds import Layer
from veneer.layers.offered import offered_method, offered_state
from veneer.layers.peft_names import WeightNames, adapters_called
from veneer.layers.route import Route
from veneer.layers.weights import stored


def offered_view(part: str) -> Any:
    """Decorates nothing: the mapping of one part of the adapters, by their names (see factor_views.py)."""

    def view(layer: Layer) -> ByName:
        return ByName(layer, VIEWS[part])

    view.__name__ = part
    return offered_state(f"{part}[name] = …")(view)


class AdapterNames(WeightNames):
    """Mixed into layers whose adapters have a scale."""

    @offered_method
    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """What an adapter adds to the weight, in the weight's shape and the factors' dtype.

        Of DoRA it is the update without the magnitude, as in PEFT. Raises KeyError if the layer has no such adapter;
        ArgumentError if it lies on several weights of this layer.
        """
        own = ByName(self, View(lambda own: own))[adapter]
        parameter = "weight" if own is self.adapters[adapter] else next(iter(self.adapters[adapter].items()))[0]
        return own.delta(tuple(stored(self, parameter).shape), own.lora_A.dtype)

    @offered_method
    def set_scale(self: Any, adapter: str, scale: float) -> None:
        """Scale an adapter's update by `scale` times its trained factor; nothing if the layer has no such adapter.

        Raises ArgumentError, or MergeError while an adapter is merged, as do the two below; but they may go on and
        off again around a forward pass of a layer that has merged by itself, where they change nothing.
        """
        factor = checked_factor(scale)
        if adapter not in self.adapters:
            return
        if factor != 1 or self._veneer_route.merged:
            _refuse_scaling(self._veneer_route)
        for own in adapters_called(self, adapter):
            own.rescale(factor * own.trained_scale)

    @offered_method
    def scale_layer(self: Any, scale: float) -> None:
        """Multiply the factors of the active adapters by `scale`."""
        factor = _checked(self, scale)
        for own in _active(self):
            own.rescale(float(own.scale) * factor)

    @offered_method
    def unscale_layer(self: Any, scale: float | None = None) -> None:
        """Divide the factors of the active adapters by `scale`; None gives them the trained ones back."""
        factor = _checked(self, 1.0 if scale is None else scale)
        if factor == 0:
            raise ArgumentError("A scale cannot be divided by 0.")
        for own in _active(self):
            own.rescale(own.trained_scale if scale is None else float(own.scale) / factor)

    lora_A = offered_view("lora_A")
    lora_B = offered_view("lora_B")
    lora_embedding_A = offered_view("lora_embedding_A")
    lora_embedding_B = offered_view("lora_embedding_B")
    lora_magnitude_vector = offered_view("lora_magnitude_vector")
    lora_dropout = offered_view("lora_dropout")
    lora_bias = offered_view("lora_bias")
    r = offered_view("r")
    scaling = offered_view("scaling")
    use_dora = offered_view("use_dora")


def _active(layer: Layer) -> list[Adapter]:
    names = [name for name in layer._veneer_route.active if name in layer.adapters]
    return [own for name in names for own in adapters_called(layer, name)]


def _refuse_scaling(route: Route) -> None:
    if route.in_weights:
        raise MergeError("The scale is part of the merged weights: call unmerge_adapter(), or unmerge() on each layer.")


def _checked(layer: Layer, scale: float) -> float:
    if layer._veneer_route.merged:
        _refuse_scaling(layer._veneer_route)
    return checked_factor(scale)

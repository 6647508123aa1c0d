"""What other libraries and scripts call on a layer: the names that PEFT's layers answer to.

Libraries call these on every layer of a model in a loop. The layers of a model share one route, so which adapters act
changes for the whole model at the first call, and the rest change nothing; what concerns gradients or weights is done
by each layer for its own. PEFT's meaning of the names: https://huggingface.co/docs/peft.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from veneer.errors import AttachError, MergeError, VeneerWarning
from veneer.layers import swap
from veneer.layers.kinds import Layer
from veneer.layers.merging import MergedHere, merge_here, unmerge_here
from veneer.layers.offered import offered, offered_method, offered_state
from veneer.layers.route import Route, as_names
from veneer.layers.twin import bare_twin

_ON_THE_MODEL = "on the model (LoraModel(model), or the PeftModel)"


class RouteNames:
    """Mixed into everything that holds something by adapter name: which adapters act, and which train.

    _veneer_child  the child that holds it
    """

    _veneer_child: str
    _veneer_route: Route
    _veneer_merged: MergedHere | None = None

    def _veneer_has(self, name: str) -> bool:
        return name in _table(self)

    @offered_method
    def set_adapter(self: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let these adapters act, in the whole model, and this layer's train unless `inference_mode`.

        Names of no adapter on the model are passed over, since a pipeline gives each of its models all names; a
        warning says so if there is none that acts then.

        Raises AttachError if an adapter concerned replaces weights of the base, which the model must do; MergeError
        while others are merged.
        """
        names = as_names(adapter_names)
        route, there = self._veneer_route, _all_names(self)
        known = tuple(dict.fromkeys(name for name in names if name in there))
        if names and not known:
            warnings.warn(
                f"No adapter {', '.join(map(repr, names))} lies on this model, so it acts without any; there are "
                f"{', '.join(map(repr, sorted(there)))}.",
                VeneerWarning,
                stacklevel=2,
            )
        if known != route.active:
            _refuse_merged(route, "another adapter acts")
            _refuse_replacing(route, set(known) ^ set(route.active), f"set_adapter {_ON_THE_MODEL}")
        route.set(active=known, asked=tuple(names))
        for name in known:
            route.trainable[name] = not inference_mode
        _follow(self)

    @offered_method
    def enable_adapters(self: Any, enabled: bool) -> None:
        """Let the chosen adapters act, or none, in the whole model. A layer that has some merged unmerges them.

        Raises AttachError if one of them replaces weights of the base, which the model must do; MergeError while the
        model has merged some.
        """
        route = self._veneer_route
        if enabled != route.enabled:
            if route.merged:
                raise MergeError("Adapters are merged in the whole model: call unmerge_adapter() first.")
            _refuse_replacing(route, set(route.active), f"disable_adapter() {_ON_THE_MODEL}")
        if not enabled:
            unmerge_here(self)
        route.set(enabled=enabled)
        _follow(self)

    @offered_method
    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Forget an adapter on this layer. With the last one the layer is what it was before.

        If no other acts then, the first that is left does, in the whole model, and a warning says so.
        Raises AttachError if it replaces weights of the base, which the model must undo; MergeError while merged.
        """
        route = self._veneer_route
        if adapter_name in route.in_weights:
            raise MergeError(f"Adapter {adapter_name!r} cannot be deleted while it is merged: unmerge it first.")
        _refuse_replacing(route, {adapter_name}, f"delete_adapter({adapter_name!r}) {_ON_THE_MODEL}")
        left = sorted(_table(self).keys() - {adapter_name})
        if adapter_name in route.asked:
            asked = tuple(name for name in route.asked if name != adapter_name)
            if not asked and left:
                warnings.warn(f"Adapter {adapter_name!r} was active; now {left[0]!r} is.", VeneerWarning, stacklevel=2)
                asked = (left[0],)
            route.set(active=tuple(name for name in asked if name in _all_names(self)), asked=asked)
        _follow(self)
        swap.forget(self, self._veneer_child, adapter_name)

    @offered_method
    def set_requires_grad(self: Any, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say whether adapters train, on this layer at once. Those that are not on it are passed over."""
        for name in as_names(adapter_names):
            if name in self._veneer_route.trainable:
                self._veneer_route.trainable[name] = requires_grad
            if requires_grad:
                self._veneer_route.may_train.add(name)
            for parameter in _trained(self, name):
                parameter.requires_grad_(requires_grad)

    @offered_state("set_adapter")
    def active_adapters(self: Any) -> list[str]:
        """The names that were chosen last, in order."""
        return list(self._veneer_route.asked)

    @offered_state("set_adapter")
    def active_adapter(self: Any) -> list[str]:
        """The same."""
        return list(self._veneer_route.asked)

    @offered_state("enable_adapters")
    def disable_adapters(self: Any) -> bool:
        """Whether adapters are disabled."""
        return not self._veneer_route.enabled

    @offered_state("merge or unmerge")
    def merged_adapters(self: Any) -> list[str]:
        """The adapters that are part of this layer's weights just now."""
        return _merged(self)

    @offered_state("merge or unmerge")
    def merged(self: Any) -> bool:
        """Whether there are any."""
        return bool(_merged(self))


class WeightNames(RouteNames):
    """Mixed into layers whose adapters can be part of their weights."""

    def _veneer_merged_with(self, names: Sequence[str], originals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's parameters with these adapters in them, by name; `originals` where others are in already."""
        raise NotImplementedError

    @offered_method
    def merge(self: Any, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters (the active ones, unless named) into this layer's weights until `unmerge`.

        safe_merge is there for PEFT's callers: every merge checks first that the result is finite. Names that are not
        on this layer are passed over.

        Raises MergeError, and then nothing has changed; AttachError if an adapter replaces weights of the base.
        """
        route = self._veneer_route
        names = list(route.active) if adapter_names is None else as_names(adapter_names)
        mine = [name for name in names if name in _table(self) and name not in _merged(self)]
        if not mine:
            return
        if route.merged:
            raise MergeError(f"{', '.join(route.merged)} is merged in the whole model: call unmerge_adapter() first.")
        if not route.enabled:
            raise MergeError("The adapters are disabled: enable them before merging.")
        if invoked := [name for name in mine if name in route.invoked]:
            raise MergeError(f"Adapter {invoked[0]!r} acts on some tokens only (alora_invocation_tokens): not merged.")
        _refuse_replacing(route, {*mine, *route.active}, f"merge_adapter() {_ON_THE_MODEL}")
        merge_here(self, mine)

    @offered_method
    def unmerge(self: Any) -> None:
        """Put this layer's own weights back, bit for bit. Warns if nothing is merged.

        Raises MergeError if the whole model has adapters merged, which it must undo.
        """
        if self._veneer_route.merged:
            raise MergeError(f"The whole model has adapters merged: call unmerge_adapter() {_ON_THE_MODEL}.")
        if self._veneer_merged is None:
            warnings.warn("Nothing is merged on this layer.", VeneerWarning, stacklevel=2)
        unmerge_here(self)

    @offered_method
    def get_base_layer(self: Any) -> nn.Module:
        """The layer without adapters, over the same parameters (see twin.py). Raises AttachError."""
        return bare_twin(self, self._veneer_child)

    @offered
    def base_layer(self: Any) -> nn.Module:
        """The same."""
        return bare_twin(self, self._veneer_child)


def _table(layer: Layer) -> nn.ModuleDict:
    """What the layer holds by adapter name."""
    return layer._modules[layer._veneer_child]


def _merged(layer: Layer) -> list[str]:
    here = () if layer._veneer_merged is None else layer._veneer_merged.names
    return [name for name in (*layer._veneer_route.merged, *here) if name in _table(layer)]


def adapters_called(layer: Layer, name: str) -> list[Any]:
    """The adapters of this name on the layer: one, or one for each of the parameters it reads."""
    own = layer.adapters[name]
    return [own] if hasattr(own, "lora_A") else [adapter for _, adapter in own.items()]


def _all_names(layer: Layer) -> set[str]:
    return {*layer._veneer_route.trainable, *_table(layer).keys()}


def _trained(layer: Layer, name: str) -> Iterator[nn.Parameter]:
    """What trains on this layer with an adapter."""
    table = _table(layer)
    if name not in table:
        return
    if layer._veneer_child != "adapters":
        yield from table[name].parameters()
        return
    for own in adapters_called(layer, name):
        yield from own.trained()


def _follow(layer: Layer) -> None:
    """Let what acts on this layer get gradients, and nothing else."""
    route = layer._veneer_route
    for name in _table(layer):
        wanted = route.enabled and name in route.active and route.trainable.get(name, True)
        if wanted:
            route.may_train.add(name)
        for parameter in _trained(layer, name):
            parameter.requires_grad_(wanted)


def _refuse_merged(route: Route, what: str) -> None:
    if names := route.in_weights:
        raise MergeError(f"{', '.join(names)} is merged: unmerge before {what}.")


def _refuse_replacing(route: Route, names: set[str], instead: str) -> None:
    """Raise AttachError if adapters have parameters of the base to exchange: a layer sees its own alone."""
    if theirs := sorted(route.replacing & names):
        raise AttachError(
            f"Adapter {theirs[0]!r} trains biases of the base or has replaced its weights, and a layer by itself "
            f"cannot exchange those: call {instead}."
        )

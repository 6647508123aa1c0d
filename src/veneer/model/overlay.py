"""What Veneer knows of a model it has laid adapters over. One `Overlay` hangs on each such model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from veneer.config import LoraConfig
from veneer.errors import AdapterFileError, AdapterNameError, check_kind
from veneer.layers.adapter import Adapter
from veneer.layers.attach import adapter_on
from veneer.layers.kinds import Layer
from veneer.layers.route import Route, as_names
from veneer.layers.stand_in import StandIns
from veneer.layers.swap import front_of, take_away
from veneer.layers.token_rows import TokenRows
from veneer.layers.walk import finder, modules_outside
from veneer.layers.weights.offloaded import Elsewhere
from veneer.suggest import did_you_mean
from veneer.targets import Resolution, Site, TokenSite

DEFAULT = "default"  # what an adapter is called unless named; in a folder it lies in the main one, as in PEFT
_ATTRIBUTE = "_veneer_overlay"
_CONFIGS = "peft_config"


class Configs(dict[str, LoraConfig]):
    """The configs of a model's adapters by name, which the model has as `peft_config`."""

    def pop(self, name: str, default: LoraConfig | None = None) -> LoraConfig | None:  # type: ignore[override]
        """Drop a name, if it is there.

        diffusers drops that of an adapter whose attaching failed, which left nothing here; a KeyError would hide why.
        """
        return super().pop(name, default)


@dataclass
class Overlay:
    """Everything by adapter name, and the route that the layers share.

    route        which adapters act; every layer has the same one
    configs      as an adapter file will say them, by which the adapters there are known
    resolutions  what they mean for this model
    biases       the biases an adapter trains
    bases        the base weights an adapter has replaced, as LoftQ does
    not_by_rows  why an adapter cannot serve rows of a batch, as found for a resolution
    idle         sites an adapter has and does not use since one with fewer layers was swapped in: zero there
    waiting      adapters whose initialisation (EVA) has not seen its data yet
    originals    while adapters are merged: the base's parameters by (path, name), to be put back as they were
    requantize   while adapters are merged: whether quantised weights were rounded again for it
    """

    route: Route = field(default_factory=Route)
    configs: Configs = field(default_factory=Configs)
    resolutions: dict[str, Resolution] = field(default_factory=dict)
    biases: dict[str, StandIns] = field(default_factory=dict)
    bases: dict[str, StandIns] = field(default_factory=dict)
    not_by_rows: dict[str, tuple[Resolution, tuple[str, ...]]] = field(default_factory=dict)
    idle: dict[str, tuple[Site, ...]] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    originals: dict[tuple[str, str], nn.Parameter | Elsewhere] = field(default_factory=dict)
    requantize: bool = False

    @property
    def trainable(self) -> dict[str, bool]:
        """Whether an adapter may get gradients, by its name; False for one that was loaded for use."""
        return self.route.trainable

    def check_names(self, names: Iterable[str]) -> None:
        """Raise AdapterNameError if an adapter of one of these names does not exist, or a name is said twice."""
        names = as_names(names)
        for name in names:
            if names.count(name) > 1:
                raise AdapterNameError(f"Adapter {name!r} is named twice; it can act, or be merged, once.")
            if name not in self.configs:
                there = ", ".join(map(repr, self.configs)) or "none"
                hint = did_you_mean(str(name), self.configs)
                raise AdapterNameError(f"There is no adapter {name!r}{hint or f'; there are {there}.'}")


def check_model(model: nn.Module) -> None:
    """Raise ArgumentError if this is no model."""
    check_kind(model, nn.Module, "A model (a torch.nn.Module)")


def overlay_of(model: nn.Module) -> Overlay | None:
    """The overlay of a model, or None if it has no adapter. Raises ArgumentError if it is no model.

    Other libraries take adapters off layer by layer, and then their names out of `model.peft_config`, or delete that:
    what they leave is taken off here.
    """
    check_model(model)
    overlay: Overlay | None = vars(model).get(_ATTRIBUTE)
    if overlay is not None and (overlay.configs.keys() != overlay.resolutions.keys() or _CONFIGS not in vars(model)):
        from veneer.model.leftovers import take_off_leftovers  # which stands on all that reads an overlay

        take_off_leftovers(model, overlay)
        return vars(model).get(_ATTRIBUTE)
    return overlay


def overlay_needed(model: nn.Module) -> Overlay:
    """The overlay of a model. Raises AdapterNameError if it has no adapter."""
    overlay = overlay_of(model)
    if overlay is None:
        raise AdapterNameError("The model has no adapter (was it merged or unloaded?).")
    return overlay


def sole_active(model: nn.Module, what: str) -> str:
    """The name of the one adapter that acts. Raises AdapterFileError, which begins with `what`, if it is not one."""
    overlay = overlay_of(model)
    active = () if overlay is None else overlay.route.active
    if len(active) != 1:
        raise AdapterFileError(f"{what}: one adapter is saved at a time, and {len(active)} are active.")
    return active[0]


def adapted_part(model: nn.Module) -> nn.Module:
    """The module that carries adapters: the model, what a PeftModel or a compiled model holds, or a part of it.

    Raises AdapterNameError if there is none, or more than one.
    """
    check_model(model)
    carriers = (module for _, module in modules_outside(model) if overlay_of(module) is not None)
    part = next(carriers, None)
    if part is None:
        raise AdapterNameError(f"{type(model).__name__} has no adapter.")
    if next(carriers, None) is not None:
        raise AdapterNameError(f"Several parts of {type(model).__name__} have adapters of their own: pass one of them.")
    return part


def overlay_made_for(model: nn.Module) -> Overlay:
    """The overlay of a model, made if it has none. Not yet hung on the model."""
    return overlay_of(model) or Overlay()


def hang(model: nn.Module, overlay: Overlay) -> None:
    """Let the model carry the overlay, and its configs under the name that transformers reads."""
    vars(model)[_ATTRIBUTE] = overlay
    vars(model)[_CONFIGS] = overlay.configs


def take_down(model: nn.Module) -> None:
    """Leave no trace of the overlay on the model, which gets its own class back if it was swapped."""
    front = front_of(model)
    if front is not None and front.whole:
        take_away(model)
    vars(model).pop(_ATTRIBUTE, None)
    vars(model).pop(_CONFIGS, None)


def adapters_by_site(model: nn.Module, name: str) -> Iterator[tuple[Site, Adapter]]:
    """What adapter `name` is on each of its sites, in the model's order."""
    find = finder(model)
    for site in overlay_needed(model).resolutions[name].sites:
        yield site, adapter_on(find(site.path), name, site.parameter)


def saved_modules(model: nn.Module, name: str) -> Iterator[tuple[str, Layer]]:
    """(path, module) of the modules that adapter `name` trains in full."""
    for path in overlay_needed(model).resolutions[name].saved:
        yield path, model.get_submodule(path)


def token_rows(model: nn.Module, name: str) -> Iterator[tuple[TokenSite, TokenRows]]:
    """The rows of embeddings that adapter `name` trains, and where they act."""
    for site in overlay_needed(model).resolutions[name].token_rows:
        module: Layer = model.get_submodule(site.path)
        yield site, module.token_rows[name]


def own_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """What trains with adapter `name` alone: factors, biases, magnitudes, copies of saved modules, token rows."""
    for _, adapter in adapters_by_site(model, name):
        yield from adapter.trained()
    for _, module in saved_modules(model, name):
        yield from module.modules_to_save[name].parameters()
    for _, rows in token_rows(model, name):
        yield from rows.parameters()


def at_ends_trains(overlay: Overlay, name: str, find: Callable[[str], nn.Module]) -> bool:
    """Whether adapter `name` trains on its first layer or its last; True if it is on none, and trains other things."""
    sites = overlay.resolutions[name].sites
    ends = (adapter_on(find(site.path), name, site.parameter) for site in (*sites[:1], *sites[-1:]))
    return not sites or any(parameter.requires_grad for adapter in ends for parameter in adapter.trained())

"""What attaching an adapter would do, with every reason against it found before anything is done."""

import re
from dataclasses import dataclass

from torch import nn

from veneer.config import LoraConfig
from veneer.errors import AdapterNameError, AttachError, ConfigError, bullet_list
from veneer.layers.attach import Adapted, check_forward
from veneer.layers.saved_module import Saved, contains_adapted
from veneer.layers.weights import read
from veneer.model.overlay import Overlay, overlay_of
from veneer.targets import Resolution, resolve

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Plan:
    """One adapter to be attached: its name, its config as an adapter file will say it, and what that means."""

    name: str
    config: LoraConfig
    resolution: Resolution


def plan(model: nn.Module, name: str, config: LoraConfig, *, strict: bool = True) -> Plan:
    """Resolve and check everything. Touches nothing.

    strict  whether a setting that matches nothing is an error, or only a warning

    Raises AdapterNameError, ConfigError, TargetError or AttachError.
    """
    overlay = overlay_of(model)
    check_name(name, overlay)
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"A LoraConfig is needed, not {type(config).__module__}.{type(config).__qualname__}.")
    config.check()
    resolution = resolve(model, config, strict=strict)
    problems = [*_clashes(model, resolution), *_clashes_of_bias(overlay, name, resolution)]
    if problems:
        raise AttachError(bullet_list(f"Adapter {name!r} cannot be attached:", problems))
    for site in resolution.sites:
        layer = model.get_submodule(site.path)
        if not isinstance(layer, Adapted):
            check_forward(layer)
        if site.dora:
            read(layer)
    stored_transposed = any(site.kind.fan_in_fan_out for site in resolution.sites)
    resolved = config.in_use(
        target_modules=resolution.target_modules,
        modules_to_save=resolution.modules_to_save,
        fan_in_fan_out=stored_transposed,
    )
    return Plan(name, resolved, resolution)


def check_name(name: str, overlay: Overlay | None) -> None:
    """Raise AdapterNameError if an adapter cannot be called so, or another one is."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"An adapter cannot be called {name!r}: a name has 1 to 64 letters, digits, '_' or '-' "
            "(it becomes part of parameter names and a folder)."
        )
    if name in dir(nn.ModuleDict):
        raise AdapterNameError(f"An adapter cannot be called {name!r}: torch modules have a method of that name.")
    if overlay is not None and name in overlay.configs:
        raise AdapterNameError(f"There is an adapter {name!r} already: delete it first, or choose another name.")


def _clashes(model: nn.Module, resolution: Resolution) -> list[str]:
    problems = []
    for path in resolution.saved:
        module = model.get_submodule(path)
        if contains_adapted(module):
            problems.append(f"modules_to_save: {path} holds layers that another adapter adapts")
        if any(isinstance(child, Saved) for child in list(module.modules())[1:]):
            problems.append(f"modules_to_save: {path} holds a module that another adapter trains in full")
    for site in resolution.sites:
        if isinstance(model.get_submodule(site.path), Saved):
            problems.append(f"target_modules: another adapter trains {site.path} in full")
    return problems


def _clashes_of_bias(overlay: Overlay | None, name: str, resolution: Resolution) -> list[str]:
    others = sorted(overlay.biases) if overlay is not None else []
    if resolution.biases and others:
        return [f"bias: adapter {others[0]!r} trains biases of this model already, and only one adapter can"]
    return []

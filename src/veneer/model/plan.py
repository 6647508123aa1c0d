"""What attaching an adapter would do, with every reason against it found before anything is done."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from veneer.config import LoraConfig
from veneer.errors import AdapterNameError, AttachError, ConfigError, MergeError, bullet_list
from veneer.layers import attach, saved_module, token_rows
from veneer.layers.attach import Adapted
from veneer.layers.by_weight import ByWeight
from veneer.layers.kinds import Layer
from veneer.layers.replication import Replication, replicated, replication_of
from veneer.layers.route import BASE
from veneer.layers.saved_module import CONTAINERS, contains_adapted, is_saved
from veneer.layers.swap import Front, check_forward
from veneer.layers.token_rows import has_rows
from veneer.layers.walk import modules_outside
from veneer.layers.weights import is_offloaded, is_quantised, rounds_inputs, store_of
from veneer.layers.weights.dense import DENSE
from veneer.layers.weights.offloaded import brings_in_submodules
from veneer.model.invocation import why_not_invoked
from veneer.model.overlay import Overlay, overlay_of
from veneer.model.sharded import check_attachable
from veneer.targets import Resolution, Site, TokenSite, resolve
from veneer.targets.structure import Structure, structure_of

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Plan:
    """One adapter to be attached: its name, its config as an adapter file will say it, and what that means."""

    name: str
    config: LoraConfig
    resolution: Resolution


def plan(
    model: nn.Module, name: str, config: LoraConfig, *, strict: bool = True, structure: Structure | None = None
) -> Plan:
    """Resolve and check everything. Touches nothing.

    strict     whether a setting that matches nothing is an error, or only a warning
    structure  the model's, if it was looked at already

    Raises AdapterNameError, ConfigError, TargetError, AttachError, or MergeError for a weight that DoRA cannot read.
    """
    overlay = overlay_of(model)
    check_attachable(model)
    check_name(name, overlay)
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"A LoraConfig is needed, not {type(config).__module__}.{type(config).__qualname__}.")
    config.check()
    if overlay is not None and overlay.route.in_weights:
        raise MergeError(f"Unmerge {', '.join(overlay.route.in_weights)} first: the weights are not the base's now.")
    stretches = _stretches(model, config, overlay)
    with replicated(model, stretches) as stack:
        structure = structure_of(model) if structure is None or isinstance(stack, Replication) else structure
        return _plan(model, name, config, overlay, stretches, structure, strict=strict)


def _plan(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    overlay: Overlay | None,
    stretches: list[tuple[int, int]] | None,
    structure: Structure,
    *,
    strict: bool,
) -> Plan:
    """The plan for a model whose layers are those that the adapter will lie on."""
    resolution, find = resolve(model, config, strict=strict, structure=structure), structure.modules.__getitem__
    problems = [
        *(problem for path in resolution.saved for problem in _why_not_saved(find(path), path, overlay)),
        *(problem for site in resolution.sites for problem in _why_not_adapted(find(site.path), site, config)),
        *(problem for site in resolution.token_rows for problem in _why_no_rows(model, site)),
        *_other_overlay(find, overlay, resolution),
        *_clashes_of_bias(overlay, resolution),
        *_why_not_biases(model, resolution),
        *_why_not_trained(model, config),
        *_brought_in_as_one(model, resolution),
        *why_not_invoked(model, config, resolution),
    ]
    if problems:
        raise AttachError(bullet_list(f"Adapter {name!r} cannot be attached:", problems))
    for path in _paths(resolution):
        module = find(path)
        if not isinstance(module, Front):
            check_forward(module)
    for site in resolution.sites:
        if site.dora or _looks_at_weights(config):
            store_of(find(site.path), site.parameter)
    stored_transposed = any(site.kind.fan_in_fan_out for site in resolution.sites)
    resolved = config.in_use(
        target_modules=resolution.target_modules,
        modules_to_save=resolution.modules_to_save,
        fan_in_fan_out=stored_transposed,
        trainable_token_indices=resolution.token_indices,
        layer_replication=stretches,
    )
    return Plan(name, resolved, resolution)


def _stretches(model: nn.Module, config: LoraConfig, overlay: Overlay | None) -> list[tuple[int, int]] | None:
    """The `layer_replication` that the adapter lies on: the config's, or that of the adapters there are.

    Raises AttachError if there are adapters on layers that would be replicated now.
    """
    there = replication_of(model)
    if config.layer_replication is None:
        return None if there is None else there.stretches
    if there is None and overlay is not None and overlay.configs:
        others = ", ".join(overlay.configs)
        raise AttachError(
            f"layer_replication={config.layer_replication}: the model has adapters already ({others}), and layers are "
            "replicated before the first one. Remove them first."
        )
    return config.layer_replication


def _paths(resolution: Resolution) -> list[str]:
    """Every module that will be changed."""
    rows = [path for site in resolution.token_rows for path in site.paths]
    return [*(site.path for site in resolution.sites), *resolution.saved, *rows]


def check_name(name: str, overlay: Overlay | None) -> None:
    """Raise AdapterNameError if an adapter cannot be called so, or another one is."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"An adapter cannot be called {name!r}: a name has 1 to 64 letters, digits, '_' or '-' "
            "(it becomes part of parameter names and a folder)."
        )
    if hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(f"An adapter cannot be called {name!r}: torch modules have an attribute of that name.")
    if name == BASE:
        raise AdapterNameError(f"An adapter cannot be called {name!r}: among adapter_names that means the base model.")
    if overlay is not None and name in overlay.configs:
        raise AdapterNameError(f"There is an adapter {name!r} already: delete it first, or choose another name.")


def _why_not_saved(module: nn.Module, path: str, overlay: Overlay | None) -> list[str]:
    problems = []
    if contains_adapted(module):
        problems.append(f"modules_to_save: {path} holds layers that another adapter adapts")
    if any(is_saved(child) for child in list(module.modules())[1:]):
        problems.append(f"modules_to_save: {path} holds a module that another adapter trains in full")
    if any(is_quantised(part) for part in module.modules()):
        problems.append(
            f"modules_to_save: {path} is quantised, and rounded numbers cannot be trained; leave it out when the model "
            "is quantised (llm_int8_skip_modules or modules_to_not_convert of its quantization_config)"
        )
    if isinstance(module, CONTAINERS):
        problems.append(f"modules_to_save: {path} is a {type(module).__name__}, never called itself; name its parts")
    if any(map(has_rows, module.modules())):
        problems.append(f"modules_to_save: {path} is or holds an embedding of which another adapter trains rows")
    if not is_saved(module) and hasattr(module, saved_module.CHILD):
        problems.append(f"modules_to_save: {path} has an attribute {saved_module.CHILD!r} of its own")
    return problems


def _looks_at_weights(config: LoraConfig) -> bool:
    """Whether the initialisation needs the values of the weights, or what their data or gradients say of them."""
    return config.init_lora_weights not in (True, False, "gaussian", "eva")


def _why_not_adapted(layer: Layer, site: Site, config: LoraConfig) -> list[str]:
    problems = []
    if is_saved(layer):
        problems.append(f"target_modules: another adapter trains {site.path} in full")
    if has_rows(layer):
        problems.append(f"target_modules: another adapter trains rows of {site.path} (trainable_token_indices)")
    if isinstance(layer, Adapted) and isinstance(layer, ByWeight) != site.by_weight:
        other = "output" if site.by_weight else "weight"
        problems.append(
            f"another adapter adapts {site.path} by its {other}; name it in the same field as that one does"
        )
    if site.by_weight and not DENSE.holds(layer, site.parameter):
        problems.append(f"{site.name} is quantised or computed from others, so no adapter can be added to it yet")
    if not isinstance(layer, Adapted) and hasattr(layer, attach.CHILD):
        problems.append(f"target_modules: {site.path} has an attribute {attach.CHILD!r} of its own")
    if site.bias and not site.kind.bias:
        problems.append(f"lora_bias: a bias cannot be added to {site.path}, {site.kind.name}")
    if why := site.kind.clash(layer, site):
        problems.append(f"target_modules: {site.path}: {why}")
    if config.init_lora_weights == "loftq" and (why := _why_not_replaced(layer, site.parameter)):
        problems.append(f"init_lora_weights='loftq' replaces the base's weights, and that of {site.path} {why}")
    if _looks_at_weights(config) and not site.kind.by_matrix:
        problems.append(
            f"init_lora_weights: {config.init_lora_weights!r} starts from a matrix, and {site.path} is an adapter on "
            f"{site.kind.name}; leave it out of the targets, or give it an adapter of its own with another start"
        )
    return problems


def _why_not_replaced(layer: Layer, parameter: str) -> str | None:
    if is_offloaded(layer, parameter):
        return "is offloaded; load the model such that it stays on a device"
    if is_quantised(layer, parameter):
        return "is quantised already; attach plain LoRA and call replace_lora_weights_loftq"
    return None


def _why_not_trained(model: nn.Module, config: LoraConfig) -> list[str]:
    """Layers that let no gradient through to those below them."""
    if config.inference_mode:
        return []
    found = [
        path
        for path, module in modules_outside(model)
        if any(type(p) is not nn.Parameter and rounds_inputs(p) for p in module._parameters.values())
    ]
    if not found:
        return []
    return [
        f"{found[0]} and {len(found) - 1} more layers round their inputs to few bits, and torchao lets no gradient "
        "through that: what is below would train on a wrong one. Quantise weights alone (Int8WeightOnlyConfig, "
        "IntxWeightOnlyConfig, Float8WeightOnlyConfig)"
    ]


def _why_not_biases(model: nn.Module, resolution: Resolution) -> list[str]:
    problems = []
    for name in resolution.biases:
        path, _, parameter = name.rpartition(".")
        if is_offloaded(model.get_submodule(path), parameter):
            problems.append(
                f"bias: {name} is offloaded, so it would get no gradient; load the model such that it stays on a device"
            )
    return problems


def _brought_in_as_one(model: nn.Module, resolution: Resolution) -> list[str]:
    """accelerate looks up each parameter inside such a module among those it had when it was dispatched."""
    whole = [path for path, module in modules_outside(model) if brings_in_submodules(module)]
    if not whole:
        return []
    return [
        f"{path} is inside {outer or 'a model'}, which is offloaded as one; dispatch the model without "
        "preload_module_classes"
        for path in _paths(resolution)
        for outer in whole
        if path == outer or not outer or path.startswith(f"{outer}.")
    ]


def _why_no_rows(model: nn.Module, site: TokenSite) -> list[str]:
    problems = []
    for path in site.paths:
        module: Layer = model.get_submodule(path)
        if isinstance(module, Adapted):
            problems.append(f"trainable_token_indices: another adapter adapts {path}")
        elif is_saved(module):
            problems.append(f"trainable_token_indices: another adapter trains {path} in full")
        elif not has_rows(module) and hasattr(module, token_rows.CHILD):
            problems.append(f"trainable_token_indices: {path} has an attribute {token_rows.CHILD!r} of its own")
    return problems


def _other_overlay(find: Callable[[str], nn.Module], overlay: Overlay | None, resolution: Resolution) -> list[str]:
    """Adapters that were laid over a part of the model, or over a model this one is part of."""
    routes = {path: vars(find(path)).get("_veneer_route") for path in _paths(resolution)}
    mine = None if overlay is None else overlay.route
    strange = [path for path, route in routes.items() if route is not None and route is not mine]
    if strange:
        return [f"{strange[0]} has adapters from another call, on a part of this model or on a whole it belongs to"]
    return []


def _clashes_of_bias(overlay: Overlay | None, resolution: Resolution) -> list[str]:
    others = sorted(overlay.biases) if overlay is not None else []
    if resolution.biases and others:
        return [f"bias: adapter {others[0]!r} trains biases of this model already, and only one adapter can"]
    return []

"""Make an EVA adapter anew with the ranks and factors that its data say. Shapes: I in, O out, R rank."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from veneer.config import EvaConfig, LoraConfig, rank_and_alpha
from veneer.errors import ConfigError, MergeError, VeneerWarning, bullet_list
from veneer.init import Components
from veneer.init.rank_spread import alpha_for
from veneer.layers import fused
from veneer.layers.attach import adapter_on, attach, detach
from veneer.layers.stand_in import StandIns
from veneer.model.apply import follow_route
from veneer.model.make import Made, new_adapter
from veneer.model.measure.observe import sees_rows
from veneer.model.merge import base_in_place
from veneer.model.overlay import Overlay, overlay_needed
from veneer.model.waiting import stop_waiting
from veneer.targets import Resolution, Site, resolve
from veneer.targets.names_on_disk import names_on_disk
from veneer.targets.structure import structure_of


def start_from(model: nn.Module, name: str, factors: Mapping[str, Tensor]) -> None:
    """Start adapter `name` from A by the path of each layer; of rank 0 where the layer is to lose its adapter.

    The config in use gets the new ranks and alphas. Layers that EVA does not look at (embeddings, say) stay as they
    are. Raises ConfigError or MergeError, and then nothing has changed.
    """
    overlay = overlay_needed(model)
    if overlay.route.in_weights:
        raise MergeError("Unmerge the adapters before one of them is initialised.")
    old = overlay.resolutions[name]
    _check(old.sites, factors)
    ranks = {site.path: len(factors[site.path]) if site.path in factors else site.rank for site in old.sites}
    config = _config_with(model, overlay.configs[name], old, ranks)
    new = resolve(model, config)
    if [site.name for site in new.sites] != [site.name for site in old.sites if ranks[site.path]]:
        raise ConfigError("No names can say which layers keep an adapter. Give target_modules as full paths.")
    dtypes = {adapter_on(model.get_submodule(site.path), name, site.parameter).lora_A.dtype for site in old.sites}
    with base_in_place(model):  # DoRA reads the weight, in whose place that of another adapter may stand
        made = [
            _made(model, site, config, factors[site.path], float32=torch.float32 in dtypes)
            for site in new.sites
            if site.path in factors
        ]
    _put(model, overlay, name, config.in_use(target_modules=new.target_modules), new, made)
    others = [site.path for site in old.sites if site.path not in factors]
    if others:
        warnings.warn(
            f"EVA looks at linear layers; {len(others)} other(s) start as usual ({', '.join(others[:3])}).",
            VeneerWarning,
            stacklevel=4,
        )


def _check(sites: tuple[Site, ...], factors: Mapping[str, Tensor]) -> None:
    wanted = {site.path: site for site in sites if sees_rows(site)}
    problems = [f"missing: {path}" for path in wanted if path not in factors]
    for path, A_RI in factors.items():
        site = wanted.get(path)
        if site is None:
            problems.append(f"not a layer that the adapter has and EVA initialises: {path}")
        elif A_RI.dim() != 2 or A_RI.shape[1] != site.shape[1]:
            problems.append(f"{path}: of shape {list(A_RI.shape)}, where rows of {site.shape[1]} features are needed")
        elif not A_RI.is_floating_point() or not A_RI.isfinite().all():
            problems.append(f"{path}: not finite real numbers")
    if not problems and not any(map(len, factors.values())):
        problems.append("no layer has a rank at all")
    if problems:
        shown = problems if len(problems) <= 6 else [*problems[:6], f"… and {len(problems) - 6} more"]
        raise ConfigError(bullet_list("eva_state_dict does not fit the adapter:", shown))


def _config_with(model: nn.Module, config: LoraConfig, old: Resolution, ranks: Mapping[str, int]) -> LoraConfig:
    """The config with these ranks, by path; targets without those of rank 0."""
    settings = EvaConfig.of(config.eva_config)
    wanted = {
        site.path: (ranks[site.path], alpha_for(site.alpha, site.rank, ranks[site.path], settings=settings))
        for site in old.sites
        if ranks[site.path]
    }
    if len(wanted) < len(old.sites):
        config = config.changed(
            target_modules=None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern={},
            alpha_pattern={},
        )
        paths = list(wanted)
        config = config.changed(
            target_modules=names_on_disk(structure_of(model), config, paths, paths, list(old.saved))
        )
    found = _with_patterns(config, wanted, [path for path in wanted if wanted[path] != (config.r, config.lora_alpha)])
    if all(rank_and_alpha(found, path) == both for path, both in wanted.items()):
        return found
    # One path is the end of another: the longer one first, and every one named.
    return _with_patterns(config, wanted, sorted(wanted, key=len, reverse=True), also_equal=True)


def _with_patterns(
    config: LoraConfig, wanted: Mapping[str, tuple[int, float]], paths: Sequence[str], *, also_equal: bool = False
) -> LoraConfig:
    return config.changed(
        rank_pattern={path: wanted[path][0] for path in paths if also_equal or wanted[path][0] != config.r},
        alpha_pattern={path: wanted[path][1] for path in paths if also_equal or wanted[path][1] != config.lora_alpha},
    )


def _made(model: nn.Module, site: Site, config: LoraConfig, A_RI: Tensor, *, float32: bool) -> Made:
    # The rows are as they will be, also if whitened: singular values of 1 leave them so.
    stats = Components(A_RI, torch.ones(len(A_RI), device=A_RI.device))
    return new_adapter(model.get_submodule(site.path), site, config, stats=stats, float32=float32)


def _put(model: nn.Module, overlay: Overlay, name: str, config: LoraConfig, new: Resolution, made: list[Made]) -> None:
    """Put the new adapters in the place of the old ones. Copies of saved modules stay."""
    old = overlay.resolutions[name]
    left = {site.path for site in new.sites}
    for site in old.sites:
        if site.path not in left:
            detach(model.get_submodule(site.path), name)
    for one in made:
        attach(model.get_submodule(one.site.path), name, one.adapter, overlay.route)
    fused.follow_adapters(model)
    if name in overlay.biases and new.biases != old.biases:  # those of layers that lost their adapter
        overlay.biases.pop(name).act(model, False, trainable=False)
        if new.biases:
            overlay.biases[name] = StandIns(model, new.biases)
    overlay.configs[name] = config
    overlay.resolutions[name] = replace(old, sites=new.sites, biases=new.biases, target_modules=new.target_modules)
    stop_waiting(model, overlay_needed(model), name)
    follow_route(model, overlay)

"""Several adapters of a model made into a new one beside them. Plan, then act: nothing changes if anything is wrong."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import ConfigError, MergeError, VeneerError, bullet_list, shortened
from veneer.functional.combine import Combination, Update, check_combination, combine, combined_rank
from veneer.layers.adapter import Adapter
from veneer.model.apply import carry_out, plain_base
from veneer.model.config_for import config_for
from veneer.model.overlay import Overlay, adapters_by_site, overlay_needed, saved_modules
from veneer.model.plan import check_name, plan
from veneer.model.tensors import site_keys
from veneer.model.updates import is_product, update_of, why_not_update
from veneer.storage import keys
from veneer.targets import Site

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Part:
    """One of the adapters on one layer, and its weight in the sum."""

    name: str
    weight: float
    site: Site
    adapter: Adapter


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    options: Combination,
    *,
    generator: Generator | None = None,
) -> None:
    """Attach the combination of adapters as a new one, which waits until it is activated.

    Its config has lora_alpha = r on every layer; task, dropout and whether it trains are the first adapter's. A layer
    that only some of the adapters have takes the sum over those. Their biases (lora_bias) are summed, and a module that
    one of them trains in full is taken over as it is.

    Raises AdapterNameError, ConfigError, MergeError, or what `plan` raises; and then nothing has changed.
    """
    overlay = overlay_needed(model)
    names, weights = _listed("adapters", adapters), _listed("weights", weights)
    check_combination(options, names, weights)
    overlay.check_names(names)
    check_name(adapter_name, overlay)
    parts = _by_layer(model, dict(zip(names, weights, strict=True)))
    _refuse(names, [*_unfit(model, overlay, names, options), *_shared_modules(model, names)])
    ranks = {path: combined_rank(options, [_rank(part) for part in some]) for path, some in parts.items()}
    todo = plan(model, adapter_name, _config(model, overlay, names, ranks))
    assert {site.path: site.rank for site in todo.resolution.sites} == ranks
    tensors = _taken_over(model, names)
    problems: list[str] = []
    with plain_base(model, overlay):
        for site in todo.resolution.sites:
            try:
                tensors |= _combined(model, site, parts[site.path], options, generator)
            except (ConfigError, MergeError) as error:
                problems.extend(f"{site.path}: {line.strip()}" for line in _lines(error))
    _refuse(names, problems)
    dtypes = [part.adapter.lora_A.dtype for some in parts.values() for part in some]
    carry_out(model, todo, tensors=tensors, float32=reduce(torch.promote_types, dtypes) not in _HALF)


def _listed(field: str, given: Any) -> list[Any]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"{field}={given!r}: must be a list, one entry for each adapter to combine.")
    return list(given)


def _by_layer(model: nn.Module, weights: Mapping[str, float]) -> dict[str, list[Part]]:
    """What there is to combine on each layer, by its path."""
    parts: dict[str, list[Part]] = {}
    for name, weight in weights.items():
        for site, adapter in adapters_by_site(model, name):
            parts.setdefault(site.path, []).append(Part(name, weight, site, adapter))
    return parts


def _rank(part: Part) -> int:
    return part.adapter.factors()[0].shape[0]


def _refuse(names: Sequence[str], problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(bullet_list(f"Adapters {', '.join(names)} cannot be combined:", shortened(problems)))


def _lines(error: VeneerError) -> list[str]:
    """The problems in an error, without its headline."""
    headline, *problems = str(error).splitlines()
    return problems or [headline]


def _unfit(model: nn.Module, overlay: Overlay, names: Sequence[str], options: Combination) -> list[str]:
    """Adapters that are not just updates, or whose updates this combination cannot take."""
    problems, kind = [], options.combination_type
    for name in names:
        problems.extend(why_not_update(model, name))
        config = overlay.configs[name]
        if name in overlay.biases:
            problems.append(
                f"adapter {name}: it trains biases of the base (bias={config.bias!r}), which only one adapter of a "
                "model can; merge it into the base first"
            )
        if not options.method.uses_svd and not all(map(is_product, overlay.resolutions[name].sites)):
            problems.append(
                f"adapter {name}: DoRA's update is no product of factors, and {kind} works on factors; choose svd, "
                "which takes W' - W"
            )
        if options.method.prunes and config.lora_bias:
            problems.append(
                f"adapter {name}: {kind} does not say what to prune of its biases (lora_bias); choose svd, linear or "
                "cat"
            )
    return problems


def _shared_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    owners: dict[str, list[str]] = {}
    for name in names:
        for path, _ in saved_modules(model, name):
            owners.setdefault(path, []).append(name)
    return [
        f"modules_to_save: {' and '.join(those)} each train {path} in full, and there is no sum of modules; combine "
        "adapters of which one at most does"
        for path, those in owners.items()
        if len(those) > 1
    ]


def _config(model: nn.Module, overlay: Overlay, names: Sequence[str], ranks: Mapping[str, int]) -> LoraConfig:
    configs = [overlay.configs[name] for name in names]
    first = configs[0]
    saved = dict.fromkeys(module for config in configs for module in config.modules_to_save or ())
    return config_for(
        model,
        ranks,
        saved=[path for name in names for path in overlay.resolutions[name].saved],
        modules_to_save=list(saved) or None,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        lora_dropout=first.lora_dropout,
        lora_bias=any(config.lora_bias for config in configs),
        inference_mode=not overlay.trainable[names[0]],
    )


def _taken_over(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The values of the modules trained in full, by their names in an adapter file."""
    return {
        keys.saved(path, inner): value
        for name in names
        for path, module in saved_modules(model, name)
        for inner, value in module.modules_to_save[name].state_dict().items()
    }


def _combined(
    model: nn.Module, site: Site, parts: Sequence[Part], options: Combination, generator: Generator | None
) -> dict[str, Tensor]:
    """The values of the new adapter on one layer, by their names in an adapter file."""
    names, weights = [part.name for part in parts], [part.weight for part in parts]
    updates = [update_of(model, part.site, part.adapter) for part in parts]
    if options.method.uses_svd:  # what DoRA adds has a rank of its own, which must not decide
        options = replace(options, svd_rank=site.rank)
    result = combine(updates, weights, options, names=names, generator=generator)
    values = {"lora_A": result.A, "lora_B": result.B}
    if site.bias:
        values["lora_bias"] = _bias(site, parts, result)
    return {key: values[part] for part, key in site_keys(site).items()}


def _bias(site: Site, parts: Sequence[Part], result: Update) -> Tensor:
    """Σ wᵢ sᵢ bᵢ over the adapters that have a bias."""
    wide = torch.promote_types(result.B.dtype, torch.float32)
    total = torch.zeros(site.shape[0], dtype=wide, device=result.B.device)
    with torch.no_grad():
        for part in parts:
            bias = part.adapter.bias_delta(wide)
            if bias is not None:
                total += part.weight * bias
    return total.to(result.B.dtype)

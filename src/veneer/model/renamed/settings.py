"""A config for the names that a model has now: the same layers, each with its rank and scale."""

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from veneer.config import LoraConfig, ends_of
from veneer.errors import TargetError, VeneerWarning
from veneer.targets import resolve
from veneer.targets.names import inside, named, selector
from veneer.targets.names_on_disk import names_on_disk
from veneer.targets.parameters import is_attention
from veneer.targets.structure import Structure

RankAndAlpha = tuple[int, float]


def renamed_config(
    model: nn.Module,
    structure: Structure,
    config: LoraConfig,
    layers: Mapping[str, RankAndAlpha],
    parameters: Mapping[str, RankAndAlpha],
    **changes: Any,
) -> LoraConfig:
    """The config that means just these layers (by path) and parameters (by full name), each with its rank and alpha.

    changes  further fields of the config

    What chose among layers has done its work and is empty then: exclude_modules, layers_to_transform. No input of a
    parameter can be dropped, so lora_dropout is 0 with one. Raises TargetError if no config can say it.
    """
    every = {**layers, **parameters}
    if parameters:
        changes["lora_dropout"] = 0.0
    new = config.changed(
        target_modules=_module_names(structure, config, list(layers), changes),
        target_parameters=_short(parameters, structure.parameters, parts=2) or None,
        rank_pattern=_pattern({name: rank for name, (rank, _) in every.items()}, config.r),
        alpha_pattern=_pattern({name: alpha for name, (_, alpha) in every.items()}, config.lora_alpha),
        **{"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, **changes},
    )
    with warnings.catch_warnings(action="ignore", category=VeneerWarning):
        sites = resolve(model, new, strict=False).sites
    found = {f"{s.path}.{s.parameter}" if s.by_weight else s.path: (s.rank, s.alpha) for s in sites}
    wanted = _with_parts(structure, every)
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise TargetError(f"No config can name what the adapter lies on now: {', '.join(wrong[:3])} would differ.")
    return new


def _with_parts(structure: Structure, every: Mapping[str, RankAndAlpha]) -> dict[str, RankAndAlpha]:
    """The same, with the two weights of an attention module in place of its path."""
    found: dict[str, RankAndAlpha] = {}
    for name, value in every.items():
        attention = name in structure.modules and is_attention(structure.modules[name])
        parts = (f"{name}.in_proj_weight", f"{name}.out_proj.weight") if attention else (name,)
        found |= dict.fromkeys(parts, value)
    return found


def renamed_modules(structure: Structure, names: Collection[str], moved: Mapping[str, str]) -> list[str]:
    """The names that mean now what the names in a list such as `modules_to_save` meant.

    moved  {former path of a module: its path now}
    """
    kept: list[str] = []
    for name in names:
        if any(named([name], path) for path in structure.modules):
            kept.append(name)
            continue
        paths = [now for former, now in moved.items() if named([name], former) and now in structure.modules]
        kept += _short(paths, structure.modules) or [name]
    return list(dict.fromkeys(kept))


def _module_names(
    structure: Structure, config: LoraConfig, paths: list[str], changes: Mapping[str, Any]
) -> list[str] | str:
    """The names the config has where they mean just these layers, or else the shortest that do."""
    if not paths:
        return []
    saved = changes.get("modules_to_save", config.modules_to_save) or []
    whole = [path for path in structure.modules if named(saved, path)]
    kept = config.target_modules
    if isinstance(kept, list):
        kept = [name for name in kept if any(named([name], path) for path in structure.modules)]
    if kept:
        selects = selector(kept)
        meant = {path for path in structure.modules if selects(path) and not inside(path, whole)}
        if meant == set(paths):
            return kept
    try:
        return names_on_disk(structure, LoraConfig(), paths, paths, whole)
    except TargetError:  # one is the end of another's path
        return "|".join(re.escape(path) for path in paths)


def _short(names: Collection[str], universe: Collection[str], *, parts: int = 1) -> list[str]:
    """The shortest ends, of so many parts at least, that mean only these of all names."""
    others = {end for name in universe if name not in names for end in ends_of(name)}
    short = (next((end for end in ends_of(name)[parts - 1 :] if end not in others), name) for name in names)
    return list(dict.fromkeys(short))


def _pattern(values: Mapping[str, Any], usual: float) -> dict[str, Any]:
    """The values that differ from the usual one, by the shortest ends of names that all have the same."""
    alike: dict[str, set[Any]] = {}
    for name, value in values.items():
        for end in ends_of(name):
            alike.setdefault(end, set()).add(value)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value != usual:
            found[next((end for end in ends_of(name) if len(alike[end]) == 1), name)] = value
    found |= {name: value for name, value in values.items() if value == usual and found.keys() & set(ends_of(name))}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))

"""Resolve a config against a model: every name must mean something, or all that do not are named at once.

The rules are PEFT's, so that a file means the same layers in both: a list entry is a full path or its last parts, a
string is a regular expression for the full path, exclusion wins, and a layer's index is the first number in its path
(or the first after a name in `layers_pattern`).
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from veneer.config import ALL_LINEAR, LoraConfig, TaskType, matches, matches_end, rank_and_alpha, whole_match
from veneer.errors import TargetError, VeneerWarning, bullet_list
from veneer.layers.kinds import kind_of
from veneer.targets.site import Site
from veneer.targets.structure import Structure, structure_of
from veneer.targets.suggest import explain_unmatched, some

HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass(frozen=True)
class Resolution:
    """What a config means for one model.

    sites           the layers that get an adapter, in the model's order
    saved           paths of the modules trained in full
    biases          full names of the bias parameters trained beside the adapter
    target_modules  the names or expression that mean just these sites, as an adapter file says it
    """

    sites: tuple[Site, ...]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    target_modules: list[str] | str
    modules_to_save: list[str] | None


def resolve(model: nn.Module, config: LoraConfig) -> Resolution:
    """The sites, saved modules and biases that `config` means in `model`. Touches nothing.

    Raises TargetError that lists everything in the config that matches nothing, with suggestions.
    """
    structure = structure_of(model)
    problems: list[str] = []
    save_names, saved = _saved(structure, config, problems)
    chosen = _excluded(structure, config, _targeted(structure, config, saved, problems), problems)
    paths = _in_layers(config, chosen, problems)
    _check_patterns(config, paths, problems)
    _check_layers(structure, config, paths, problems)
    if not paths and not problems:
        problems.append("no layer is left to adapt: what target_modules names is excluded or trained in full")
    if problems:
        raise TargetError(bullet_list(f"{len(problems)} setting(s) do not fit {structure.model_name}:", problems))
    sites = tuple(_site(structure, config, path) for path in paths)
    _warn_of_rank(sites)
    return Resolution(
        sites=sites,
        saved=tuple(saved),
        biases=_biases(structure, config, paths, saved),
        target_modules=_names_on_disk(structure, config, chosen, paths, saved),
        modules_to_save=save_names or None,
    )


def named(names: Iterable[str], path: str) -> list[str]:
    """Those of the names that mean this path: the path itself, or its end after a dot."""
    return [name for name in names if path == name or path.endswith(f".{name}")]


def _as_list(choice: list[str] | str | None) -> list[str]:
    return [choice] if isinstance(choice, str) else choice or []


def _selector(choice: list[str] | str) -> Callable[[str], bool]:
    if isinstance(choice, str):
        return lambda path: matches(choice, path)
    return lambda path: bool(named(choice, path))


def _saved(structure: Structure, config: LoraConfig, problems: list[str]) -> tuple[list[str], list[str]]:
    """Names and paths of the modules trained in full: those asked for, and the head of a classifier."""
    heads = HEADS.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()
    present = [head for head in heads if any(named([head], path) for path in structure.modules)]
    # PEFT lists every name a head may have; those that this model does not have mean nothing
    names = [name for name in config.modules_to_save or [] if name in present or name not in heads]
    for name in names:
        if not any(named([name], path) for path in structure.modules):
            problems.append(explain_unmatched("modules_to_save", name, structure.modules))
    names += [head for head in present if head not in names]
    if heads and not names:
        warnings.warn(
            f"task_type={config.task_type} trains a new head, but {structure.model_name} has no "
            f"{' or '.join(heads)}: name its head in modules_to_save, or it stays as it is.",
            VeneerWarning,
            stacklevel=4,
        )
    paths = [path for path in structure.modules if named(names, path)]
    outermost = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    return names, outermost


def _inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _targeted(structure: Structure, config: LoraConfig, saved: list[str], problems: list[str]) -> list[str]:
    """The paths that target_modules means, before exclusions by the other fields."""
    target = config.target_modules
    if target is None or target == ALL_LINEAR:
        chosen = [path for path in structure.linear_layers if not _inside(path, saved)]
        if not chosen:
            problems.append(f"target_modules={target!r}: there is no linear layer to adapt")
        return chosen
    selects = _selector(target)
    found = [path for path in structure.modules if selects(path)]
    for name in _as_list(target):
        mine = found if isinstance(target, str) else [path for path in found if named([name], path)]
        if not mine:
            problems.append(
                explain_unmatched("target_modules", name, structure.layers, is_pattern=isinstance(target, str))
            )
        elif all(_inside(path, saved) for path in mine):
            problems.append(f"target_modules: {name!r} means only modules that modules_to_save trains in full")
    return [path for path in found if not _inside(path, saved)]


def _excluded(structure: Structure, config: LoraConfig, chosen: list[str], problems: list[str]) -> list[str]:
    exclude = config.exclude_modules
    if not exclude:
        return chosen
    # a file may exclude what "all-linear" would have meant, and its resolved names do not
    candidates = list(dict.fromkeys([*chosen, *structure.layers]))
    for name in _as_list(exclude):
        if not any(map(_selector(exclude if isinstance(exclude, str) else [name]), candidates)):
            problems.append(explain_unmatched("exclude_modules", name, candidates, is_pattern=isinstance(exclude, str)))
    drops = _selector(exclude)
    return [path for path in chosen if not drops(path)]


def _layer_patterns(config: LoraConfig) -> list[str]:
    """Regular expressions for the start of a path, up to the layer's number; the first that matches counts."""
    names = _as_list(config.layers_pattern)
    return [rf"(?:.*?\.)??(?:{name})" for name in names] if names else [r".*?\.[^.]*"]


def _layer_index(patterns: list[str], path: str) -> int | None:
    found = (whole_match(rf"{pattern}\.(?P<index>\d+)\..*", path) for pattern in patterns)
    return next((int(match["index"]) for match in found if match), None)


def _in_layers(config: LoraConfig, chosen: list[str], problems: list[str]) -> list[str]:
    wanted = config.layers_to_transform
    if wanted is None:
        return chosen
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = _layer_patterns(config)
    index = {path: _layer_index(patterns, path) for path in chosen}
    kept = [path for path in chosen if index[path] in wanted]
    existing = sorted({i for i in index.values() if i is not None})
    lists = sorted({name for path in chosen for name, number in pairwise(path.split(".")) if number.isdigit()})
    if chosen and not existing:
        hint = f"layers_pattern can be {' or '.join(map(repr, lists))}" if lists else "leave it out"
        problems.append(f"layers_to_transform: no targeted layer has a number where it is looked for; {hint}")
    elif absent := sorted(set(wanted) - set(existing)):
        problems.append(
            f"layers_to_transform: no targeted layer has index {', '.join(map(str, absent))}; "
            f"there are {existing[0]} to {existing[-1]}"
        )
    else:
        problems.extend(_lost_in_layers(config, chosen, kept))
        for name, pattern in zip(_as_list(config.layers_pattern), patterns, strict=False):
            if chosen and all(_layer_index([pattern], path) is None for path in chosen):
                problems.append(f"layers_pattern: {name!r} matches nothing; there are {', '.join(lists)}")
    return kept


def _lost_in_layers(config: LoraConfig, chosen: list[str], kept: list[str]) -> list[str]:
    """Target names that layers_to_transform leaves without any layer, or whose very path it drops and PEFT does not."""
    if not isinstance(config.target_modules, list):
        return []
    means = {name: [path for path in chosen if named([name], path)] for name in config.target_modules}
    return [
        f"target_modules: {name!r} means {some(paths)}, which layers_to_transform leaves out; give longer names"
        for name, paths in means.items()
        if paths and (not set(paths) & set(kept) or name in set(paths) - set(kept))
    ]


def _check_patterns(config: LoraConfig, paths: list[str], problems: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        free = list(paths)
        for key in getattr(config, field):
            mine = [path for path in paths if matches_end(key, path)]
            if paths and not mine:
                problems.append(explain_unmatched(field, key, paths))
            elif mine and not set(mine) & set(free):
                problems.append(f"{field}: {key!r} has no effect, keys before it match the same layers; put it first")
            free = [path for path in free if path not in set(mine)]


def _check_layers(structure: Structure, config: LoraConfig, paths: list[str], problems: list[str]) -> None:
    refused: dict[str, list[str]] = {}
    for path in paths:
        if reason := structure.refusal(path):
            refused.setdefault(reason, []).append(path)
    problems.extend(f"target_modules: {some(those)} cannot be adapted: {why}" for why, those in refused.items())
    if config.fan_in_fan_out and paths and not problems:
        kinds = {kind.name for path in paths if (kind := kind_of(structure.modules[path]))}
        if "conv1d" not in kinds:
            problems.append(
                "fan_in_fan_out=True: the targets store their weight as (out, in), so it would change nothing; "
                "leave it out (it belongs to GPT-2's Conv1D)"
            )


def _site(structure: Structure, config: LoraConfig, path: str) -> Site:
    layer = structure.modules[path]
    kind = kind_of(layer)
    assert kind is not None
    rank, alpha = rank_and_alpha(config, path)
    return Site(path, kind, kind.dims(layer), rank, alpha, config.use_rslora, config.use_dora, config.lora_dropout)


def _warn_of_rank(sites: tuple[Site, ...]) -> None:
    wasteful = [site for site in sites if site.rank > min(site.shape)]
    if wasteful:
        one = wasteful[0]
        warnings.warn(
            f"{len(wasteful)} layer(s) get a rank above what their weight can have, which costs memory and adds "
            f"nothing: {one.path} is {one.shape[0]} × {one.shape[1]}, rank {one.rank}.",
            VeneerWarning,
            stacklevel=4,
        )


def _biases(structure: Structure, config: LoraConfig, paths: list[str], saved: list[str]) -> tuple[str, ...]:
    if config.bias == "none":
        return ()
    owners = paths if config.bias == "lora_only" else list(structure.modules)
    return tuple(f"{path}.bias" for path in owners if structure.has_bias(path) and not _inside(path, saved))


def _names_on_disk(
    structure: Structure, config: LoraConfig, chosen: list[str], paths: list[str], saved: list[str]
) -> list[str] | str:
    """The target_modules of the adapter file: as given, or the shortest names that mean just the adapted layers.

    The names may also mean chosen layers that layers_to_transform drops, by their number, when the file is read.
    """
    target = config.target_modules
    if target is not None and target != ALL_LINEAR:
        return sorted(target) if isinstance(target, list) else target
    patterns = _layer_patterns(config)
    numbered = {path for path in chosen if _layer_index(patterns, path) is not None}
    harmless = {*paths, *(numbered if config.layers_to_transform is not None else ())}
    others = [path for path in structure.modules if path not in harmless and not _inside(path, saved)]
    drops = _selector(config.exclude_modules) if config.exclude_modules else lambda path: False
    others = [path for path in others if not drops(path)]
    taken = {suffix for path in others for suffix in _suffixes(path)}
    names: set[str] = set()
    for path in paths:
        name = next((suffix for suffix in _suffixes(path) if suffix not in taken), None)
        if name is None:
            other = next(other for other in others if named([path], other))
            raise TargetError(
                f"target_modules={target!r}: no name in an adapter file can mean {path} without {other}, which is not "
                "adapted. Give target_modules as a regular expression for the whole path."
            )
        names.add(name)
    return sorted(names)


def _suffixes(path: str) -> list[str]:
    """The ends of a path at dots, shortest first.

    >>> _suffixes("layers.0.q_proj")
    ['q_proj', '0.q_proj', 'layers.0.q_proj']
    """
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]

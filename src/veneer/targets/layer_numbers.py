"""`layers_to_transform` and `layers_pattern`: which of the chosen layers have one of the wanted numbers."""

from itertools import pairwise

from veneer.config import LoraConfig, whole_match
from veneer.targets.findings import Findings
from veneer.targets.names import as_list, named
from veneer.targets.suggest import some


def layer_patterns(config: LoraConfig) -> list[str]:
    """Regular expressions for the start of a path, up to the layer's number; the first that matches counts."""
    names = as_list(config.layers_pattern)
    return [rf"(?:.*?\.)??(?:{name})" for name in names] if names else [r".*?\.[^.]*"]


def layer_index(patterns: list[str], path: str) -> int | None:
    """The number of the layer a path belongs to, None if it has none."""
    found = (whole_match(rf"{pattern}\.(?P<index>\d+)\..*", path) for pattern in patterns)
    return next((int(match["index"]) for match in found if match), None)


def in_layers(config: LoraConfig, chosen: list[str], findings: Findings) -> list[str]:
    """Those of the chosen paths that layers_to_transform keeps; all if it is not set."""
    wanted = config.layers_to_transform
    if wanted is None or not chosen:
        return chosen
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = layer_patterns(config)
    index = {path: layer_index(patterns, path) for path in chosen}
    kept = [path for path in chosen if index[path] in wanted]
    existing = sorted({i for i in index.values() if i is not None})
    lists = sorted({name for path in chosen for name, number in pairwise(path.split(".")) if number.isdigit()})
    if chosen and not existing:
        hint = f"layers_pattern can be {' or '.join(map(repr, lists))}" if lists else "leave it out"
        findings.wrong.append(f"layers_to_transform: no targeted layer has a number where it is looked for; {hint}")
    elif absent := sorted(set(wanted) - set(existing)):
        findings.idle.append(
            f"layers_to_transform: no targeted layer has index {', '.join(map(str, absent))}; "
            f"there are {existing[0]} to {existing[-1]}"
        )
    else:
        wrong, idle = _lost_in_layers(config, chosen, kept)
        findings.wrong.extend(wrong)
        findings.idle.extend(idle)
        for name, pattern in zip(as_list(config.layers_pattern), patterns, strict=False):
            if chosen and all(layer_index([pattern], path) is None for path in chosen):
                findings.idle.append(f"layers_pattern: {name!r} matches nothing; there are {', '.join(lists)}")
    return kept


def _lost_in_layers(config: LoraConfig, chosen: list[str], kept: list[str]) -> tuple[list[str], list[str]]:
    """Target names whose very path layers_to_transform drops and PEFT does not; and those it leaves without a layer."""
    if not isinstance(config.target_modules, list):
        return [], []
    wrong, idle = [], []
    for name in config.target_modules:
        paths = [path for path in chosen if named([name], path)]
        text = f"target_modules: {name!r} means {some(paths)}, which layers_to_transform leaves out; give longer names"
        if name in set(paths) - set(kept):
            wrong.append(text)
        elif paths and not set(paths) & set(kept):
            idle.append(text)
    return wrong, idle

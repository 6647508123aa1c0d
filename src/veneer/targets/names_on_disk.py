"""The `target_modules` of an adapter file: names that PEFT, and we, read as just the adapted layers."""

from veneer.config import ALL_LINEAR, LoraConfig, ends_of
from veneer.errors import TargetError
from veneer.targets.layer_numbers import layer_index, layer_patterns
from veneer.targets.names import inside, named, selector
from veneer.targets.structure import Structure


def names_on_disk(
    structure: Structure, config: LoraConfig, chosen: list[str], paths: list[str], saved: list[str]
) -> list[str] | str:
    """The target_modules of the adapter file: as given, or the shortest names that mean just the adapted layers.

    The names may also mean chosen layers that layers_to_transform drops, by their number, when the file is read.
    """
    target = config.target_modules
    if not target and config.target_parameters:
        return []
    if target is not None and target != ALL_LINEAR:
        return sorted(target) if isinstance(target, list) else target
    patterns = layer_patterns(config)
    numbered = {path for path in chosen if layer_index(patterns, path) is not None}
    harmless = {*paths, *(numbered if config.layers_to_transform is not None else ())}
    others = [path for path in structure.modules if path not in harmless and not inside(path, saved)]
    drops = selector(config.exclude_modules) if config.exclude_modules else lambda path: False
    others = [path for path in others if not drops(path)]
    taken = {suffix for path in others for suffix in ends_of(path)}
    names: set[str] = set()
    for path in paths:
        name = next((suffix for suffix in ends_of(path) if suffix not in taken), None)
        if name is None:
            other = next(other for other in others if named([path], other))
            raise TargetError(
                f"target_modules={target!r}: no name in an adapter file can mean {path} without {other}, which is not "
                "adapted. Give target_modules as a regular expression for the whole path."
            )
        names.add(name)
    return sorted(names)

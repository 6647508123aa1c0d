"""A config for a new adapter that names layers as an older version of the model did."""

import re
import warnings

from torch import nn

from veneer.config import ALL_LINEAR, LoraConfig, rank_and_alpha
from veneer.errors import TargetError, VeneerWarning, bullet_list, check_kind, shortened
from veneer.functional.lowrank import scaling
from veneer.layers.kinds import kind_of
from veneer.model.renamed.former_names import Place, former_layers, former_names
from veneer.model.renamed.pieces import Joined, Piece
from veneer.model.renamed.settings import RankAndAlpha, renamed_config
from veneer.targets.layer_numbers import layer_index, layer_patterns
from veneer.targets.names import inside, named, selector
from veneer.targets.parameters import kind_of_parameter
from veneer.targets.structure import Structure, structure_of


def with_names_of_today(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with the parameters in target_parameters that target_modules means by former names of layers.

    Where several layers lie in one parameter now, as the experts of a layer do, the adapter on it has the sum of their
    ranks and their scale. Warns of what became what. A config with target_parameters is taken as it is: whoever
    writes those knows today's names.

    Raises TargetError if only a part of such a parameter is named.
    """
    check_kind(model, nn.Module, "A model (a torch.nn.Module)")
    if not isinstance(config, LoraConfig) or config.target_parameters or config.layer_replication:
        return config
    if config.target_modules in (None, ALL_LINEAR, []) or not (names := former_names(model)):
        return config
    structure = structure_of(model)
    chosen = _Chosen(structure, config)
    once = former_layers(names)
    stays = [path for path in structure.modules if chosen.has([path])]
    found: dict[str, dict[str, Place]] = {}
    for place, formers in once.items():
        formers = [former for former in formers if former not in structure.modules]
        # of two names for one layer, that of today counts: a pattern that leaves it out means that
        if chosen.has(formers, idle_only=place.is_whole) and not place.refused:
            found.setdefault(place.name, {})[chosen.first(formers)] = place
    readers = [p for p in stays if kind_of(structure.modules[p]) is None and f"{p}.weight" in structure.parameters]
    if all(place.is_whole for place in once):  # then a module that reads its weight always did
        readers = []
    if not found and not readers:
        return config
    layers = {path: rank_and_alpha(config, path) for path in stays if path not in readers}
    parameters = {f"{path}.weight": rank_and_alpha(config, path) for path in readers}
    became = {f"{path}.weight": [path] for path in readers}
    for name, formers in found.items():
        owner = name.removesuffix(".weight")
        value = _rank_and_alpha(structure, config, name, formers)
        is_layer = name != owner and kind_of(structure.modules[owner]) is not None
        (layers if is_layer else parameters).setdefault(owner if is_layer else name, value)
        became[name] = list(formers)
    order = {name: index for index, name in enumerate(structure.parameters)}
    parameters = dict(sorted(parameters.items(), key=lambda item: order[item[0]]))
    if parameters and config.lora_dropout:
        raise TargetError(
            f"target_modules={config.target_modules!r}: some of these are parameters now ({next(iter(parameters))}), "
            f"of which no input can be dropped: set lora_dropout=0 (it is {config.lora_dropout:g}), or leave them out "
            "by names with more parts (shared_expert.down_proj, say)."
        )
    new = renamed_config(model, structure, config, layers, parameters)
    warnings.warn(_notice(structure, config, new, became), VeneerWarning, stacklevel=5)
    return new


class _Chosen:
    """Which layers a config chooses, by any of the paths that they had."""

    def __init__(self, structure: Structure, config: LoraConfig) -> None:
        assert config.target_modules is not None
        self._selects = selector(config.target_modules)
        entries = config.target_modules if isinstance(config.target_modules, list) else None
        if entries is not None:
            idle = [name for name in entries if not any(named([name], path) for path in structure.modules)]
            self._selects_idle = selector(idle)
        elif any(map(self._selects, structure.modules)):
            self._selects_idle = selector([])
        else:
            self._selects_idle = self._selects
        self._drops = selector(config.exclude_modules or [])
        wanted = config.layers_to_transform
        self._numbers = [wanted] if isinstance(wanted, int) else wanted
        self._patterns = layer_patterns(config)
        self._saved = [path for path in structure.modules if named(config.modules_to_save or [], path)]

    def has(self, paths: list[str], *, idle_only: bool = False) -> bool:
        """Whether the layer with these paths would get an adapter.

        idle_only  count only what means no layer of today
        """
        selects = self._selects_idle if idle_only else self._selects
        if not any(map(selects, paths)) or any(map(self._drops, paths)) or any(inside(p, self._saved) for p in paths):
            return False
        return self._numbers is None or any(layer_index(self._patterns, path) in self._numbers for path in paths)

    def first(self, paths: list[str]) -> str:
        """The first of the paths that is selected."""
        return next(filter(self._selects, paths))


def _rank_and_alpha(structure: Structure, config: LoraConfig, name: str, formers: dict[str, Place]) -> RankAndAlpha:
    pieces: list[Piece] = []
    for former, place in formers.items():
        rank, alpha = rank_and_alpha(config, former)
        pieces.append(Piece(former, place, rank, alpha, scaling(alpha, rank, rslora=config.use_rslora)))
    first = pieces[0]
    if first.place.is_whole:
        return first.rank, first.alpha
    owner, _, own = name.rpartition(".")
    stack = kind_of_parameter(structure.modules[owner], own).stack
    assert stack is not None
    joined = Joined(tuple(pieces), stack, config.use_rslora)
    if why := joined.why_not_whole():
        raise TargetError(
            f"target_modules={config.target_modules!r}: some of these lie in {name} now, with others, and {why}. Name "
            f"all of them, or write target_parameters={['.'.join(name.split('.')[-2:])]!r} yourself, or leave them out "
            "by names with more parts (shared_expert.up_proj, say)."
        )
    return joined.rank, joined.alpha


def _notice(structure: Structure, config: LoraConfig, new: LoraConfig, became: dict[str, list[str]]) -> str:
    lines: dict[str, None] = {}
    for name, formers in became.items():
        leaves = " + ".join(dict.fromkeys(former.rpartition(".")[2] for former in formers))
        owner = name.removesuffix(".weight")
        is_layer = name != owner and kind_of(structure.modules[owner]) is not None
        rank, alpha = rank_and_alpha(new, owner if is_layer else name)
        now = re.sub(r"\b\d+\b", "*", owner) if is_layer else ".".join(name.split(".")[-2:])
        lines[f"{leaves} → {now}, rank {rank}, alpha {alpha:g}"] = None
    write = {"target_modules": new.target_modules, "target_parameters": new.target_parameters}
    now = " and ".join(f"{field}={value!r}" for field, value in write.items() if value)
    return bullet_list(
        f"target_modules={config.target_modules!r} names layers of an older version of {structure.model_name}. In this "
        f"one they are {now}; write that to be without this warning:",
        shortened(list(lines)),
    )

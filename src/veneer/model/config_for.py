"""The config of an adapter that is made from factors at hand: which layers, which rank on each, scale 1."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from veneer.config import LoraConfig, ends_of
from veneer.errors import TargetError
from veneer.targets.names_on_disk import names_on_disk
from veneer.targets.structure import structure_of


def config_for(model: nn.Module, ranks: Mapping[str, int], *, saved: Sequence[str] = (), **fields: Any) -> LoraConfig:
    """A config that means just these layers, each with its rank, and updates that are B A itself.

    ranks   of each layer, by its path
    saved   paths of the modules trained in full
    fields  further fields of the config

    Raises ConfigError, also for a rank that no weight can have.
    """
    often = Counter(ranks.values())
    rank = max(often, key=lambda r: (often[r], r))
    pattern = _pattern(ranks, rank)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_names(model, list(ranks), list(saved)),
        **fields,
    )


def _pattern(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """The ranks that differ. A path also means paths that end with it: those come before it, with their own rank."""
    differing = {path for path in ranks if ranks[path] != rank}
    meant = [path for path in ranks if differing.intersection(ends_of(path))]
    return {path: ranks[path] for path in sorted(meant, key=len, reverse=True)}


def _names(model: nn.Module, paths: list[str], saved: list[str]) -> list[str] | str:
    try:
        return names_on_disk(structure_of(model), LoraConfig(), paths, paths, saved)
    except TargetError:  # one of them is the end of a layer's path that is not meant: only an expression can say that
        return "|".join(re.escape(path) for path in paths)

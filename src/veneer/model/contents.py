"""What an adapter file holds, told from the names and shapes of its tensors and its config. Loads no torch."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, Protocol

from veneer.config.patterns import matches, matches_end, pattern_fault
from veneer.storage.keys import PREFIX

FACTORS_A = (".lora_A.weight", ".lora_embedding_A")
FACTORS_B = (".lora_B.weight", ".lora_embedding_B")
BESIDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_B.bias", ".lora_embedding_B.bias")
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
COPIES = (".base_layer.weight", ".token_adapter.base_layer.weight")  # of the base, for a reader that compares
WRAPPED = ".base_layer"


class Shaped(Protocol):
    """A tensor, or what a file's header or a model says of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...


@dataclass
class Group:
    """The layers of one name: their ranks, scales and shapes (out, in), and how many numbers are theirs.

    matrices  how many each holds: 1, or the number of experts stacked in a parameter
    """

    paths: set[str] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    scales: set[float] = field(default_factory=set)
    matrices: set[int] = field(default_factory=set)
    outs: set[int] = field(default_factory=set)
    ins: set[int] = field(default_factory=set)
    parameters: int = 0


@dataclass
class Contents:
    """What a file holds: adapted layers by name, then other tensors in one line for each name: (how many, numbers).

    whole   modules and biases trained in full; rows: embeddings of which rows are; copies: weights of the base
    """

    groups: dict[str, Group]
    whole: dict[str, tuple[int, int]]
    rows: dict[str, tuple[int, int]]
    copies: dict[str, tuple[int, int]]

    @property
    def parameters(self) -> int:
        """How many numbers were trained; copies of the base were not."""
        others = [*self.whole.values(), *self.rows.values()]
        return sum(group.parameters for group in self.groups.values()) + sum(numbers for _, numbers in others)


def contents_of(tensors: Mapping[str, Shaped], config: Mapping[str, Any]) -> Contents:
    """The tensors of a file, told apart by their names and by what the config says of the layers."""
    found = Contents(defaultdict(Group), {}, {}, {})
    for name, info in tensors.items():
        numbers = prod(info.shape)
        suffix = next((end for end in (*FACTORS_A, *FACTORS_B, *BESIDE) if name.endswith(end)), None)
        if suffix is not None:
            _add_to_group(found.groups, name.removesuffix(suffix), suffix, info.shape, config)
        elif name.endswith(TOKEN_ROWS):
            _add_line(found.rows, f"{name.removesuffix(TOKEN_ROWS)} ({info.shape[0]} rows)", numbers)
        elif name.endswith(COPIES):
            _add_line(found.copies, f"{name} (copy of the base)", numbers)
        else:
            _add_line(found.whole, f"{name} (whole)", numbers)
    return found


def _add_to_group(
    groups: dict[str, Group], path: str, suffix: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> None:
    stacked = _is_parameter(path, config)
    group = groups[_parameter_name(path, config) if stacked else path.rpartition(".")[2]]
    group.paths.add(path)
    group.parameters += prod(shape)
    if suffix in FACTORS_A:
        group.ins.add(prod(shape[1:]))
        rank = _rank_of_each(shape[0], config) if stacked else shape[0]
        if rank is not None:  # else a pattern sets it, for a name that the file does not say
            group.ranks.add(rank)
            group.matrices.add(shape[0] // rank)
        if (scale := scale_of(rank, _alpha(path, config), rslora=config.get("use_rslora") is True)) is not None:
            group.scales.add(scale)
    if suffix in FACTORS_B:
        group.outs.add(shape[0])


def _is_parameter(path: str, config: Mapping[str, Any]) -> bool:
    """Whether an adapter at this path lies on a parameter (target_parameters), not on a layer."""
    path = _short(path)
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    targets = config.get("target_modules") or []
    if not config.get("target_parameters"):
        return False
    if isinstance(targets, str):
        return pattern_fault(targets) is None and not matches(targets, path)
    return not any(path == name or path.endswith(f".{name}") for name in map(str, targets))


def _parameter_name(path: str, config: Mapping[str, Any]) -> str:
    """What the adapters on a parameter are called. Those of one module nest in a file, the last one outside."""
    owner = path
    while owner.endswith(WRAPPED):
        owner = owner.removesuffix(WRAPPED)
    entries = map(str, config["target_parameters"])
    names = {
        name
        for name_of_owner, _, name in (entry.rpartition(".") for entry in entries)
        if f".{owner}".endswith(f".{name_of_owner}")
    }
    place = (len(path) - len(owner)) // len(WRAPPED) + 1
    short = owner.rpartition(".")[2]
    return f"{short}.{names.pop()}" if len(names) == 1 else f"{short} (parameter {place} from the end)"


def _rank_of_each(rows: int, config: Mapping[str, Any]) -> int | None:
    """The rank of each of the matrices that are stacked in a parameter; None if the config alone does not say."""
    rank = config.get("r")
    known = isinstance(rank, int) and rank > 0 and rows % rank == 0
    return rank if known and not config.get("rank_pattern") and not config.get("alpha_pattern") else None


def _alpha(path: str, config: Mapping[str, Any]) -> Any:
    patterns = config.get("alpha_pattern")
    for key, alpha in patterns.items() if isinstance(patterns, dict) else ():
        if pattern_fault(key) is None and matches_end(key, _short(path)):
            return alpha
    return config.get("lora_alpha")


def _add_line(lines: dict[str, tuple[int, int]], name: str, numbers: int) -> None:
    """Count a tensor among those of the same name in other layers."""
    name = re.sub(r"\.\d+(?=\.)", ".*", _short(name))
    count, before = lines.get(name, (0, 0))
    lines[name] = count + 1, before + numbers


def _short(name: str) -> str:
    return name.removeprefix(PREFIX)


def scale_of(rank: Any, alpha: Any, *, rslora: bool) -> float | None:
    """What an update of this rank and alpha is multiplied with; None if these are no numbers."""
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        return None
    return alpha / (sqrt(rank) if rslora else rank)

"""Where the weights of an older transformers are in a model of this one.

transformers has a table of that for base checkpoints, by class of model. It is asked here, not imported: whoever has
one of its models has loaded it.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import nn

from veneer.layers.attach import Adapters
from veneer.layers.saved_module import Copies
from veneer.layers.token_rows import RowsByAdapter
from veneer.layers.walk import modules_outside

_TABLE, _RULES, _MODELS = (
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.modeling_utils",
)
_OURS = (Adapters, Copies, RowsByAdapter)
# What a rule does to the weights it gathers: (operation, dimension), and whether they are matrices of a stack then.
_STACK, _BELOW = ("MergeModulelist", 0), "Concatenate"


@dataclass(frozen=True)
class Place:
    """Where a weight is now: in the parameter of this full name.

    matrix       which matrix of the stack there; None if there is no stack
    part, parts  which, of how many that lie one below the other
    refused      why an adapter cannot follow it there, or nothing
    """

    name: str
    matrix: int | None = None
    part: int = 0
    parts: int = 1
    refused: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it is all of that parameter: only its name changed."""
        return self.matrix is None and self.parts == 1 and not self.refused


class _Bare:
    """A model as transformers' table is to see it, which asks for its modules: without the adapters' own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module)."""
        return modules_outside(self._model, _OURS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class FormerNames:
    """The names that the weights of a model had before, as transformers tells them.

    prefix  the path of the transformers model in the whole one, with a dot at its end
    """

    def __init__(self, model: nn.Module, prefix: str, table: ModuleType, rules: ModuleType) -> None:
        self.prefix = prefix
        self._rename = rules.rename_source_key
        bare = _Bare(model)
        found: list[Any] = table.get_model_conversion_mapping(bare)
        self._converters = [one for one in found if isinstance(one, rules.WeightConverter)]
        self._renamings = [one for one in found if not isinstance(one, rules.WeightConverter)]
        # without what only mends checkpoints that some versions wrote
        renamings = table.get_model_conversion_mapping(bare, add_legacy=False)
        renamings = [one for one in reversed(renamings) if not isinstance(one, rules.WeightConverter)]
        self._back = [one.reverse_transform() for one in renamings]
        found_at: dict[int, tuple[str, nn.Parameter]] = {}
        for path, part in bare.named_modules():
            for name, value in part._parameters.items():
                if value is not None:  # one that is shared counts under its first name
                    found_at.setdefault(id(value), (f"{prefix}{path}.{name}" if path else f"{prefix}{name}", value))
        self._parameters = dict(found_at.values())

    def place(self, name: str) -> Place | None:
        """Where the weight that once had this full name is now; None if it is not of this model."""
        if not name.startswith(self.prefix):
            return None
        plain, _ = self._rename(name.removeprefix(self.prefix), self._renamings, [])
        for converter in self._converters:
            new, source = self._rename(plain, [], [converter])
            if source is not None:
                return self._gathered(converter, f"{self.prefix}{new}", plain, source)
        return Place(f"{self.prefix}{plain}")

    def _gathered(self, converter: Any, new: str, plain: str, source: str) -> Place:
        done = tuple((type(one).__name__, getattr(one, "dim", None)) for one in converter.operations)
        parts, targets = len(converter.source_patterns), len(converter.target_patterns)
        numbers = re.search(source.replace("*.", r"(\d+)\."), plain) if "*" in source else None
        stacked = done[:1] == (_STACK,) and numbers is not None
        rest = done[1:] if stacked else done
        if targets > 1 or rest != (((_BELOW, 1 if stacked else 0),) if parts > 1 else ()):
            steps = " and ".join(name for name, _ in done)
            return Place(new, refused=f"transformers rearranges its values now ({steps})")
        matrix = int(numbers[1]) if stacked and numbers is not None else None
        return Place(new, matrix, converter.source_patterns.index(source), parts)

    def layers(self) -> Iterator[tuple[str, Place]]:
        """(former path of a layer, where its weight is now), the oldest path of each first."""
        if not (self._back or self._converters):
            return
        for name, weight in self._parameters.items():
            for former in self._older(name):
                if former != name and self.place(former) == Place(name):
                    yield former.removesuffix(".weight"), Place(name)
            for known, after in self._gathered_in(name):
                for former in self._older(known):
                    place = self.place(former)
                    if place is None or place.name != name:
                        continue
                    yield former.removesuffix(".weight"), place
                    start = former.removesuffix(f"0{after}")
                    for matrix in range(1, len(weight) if place.matrix is not None else 1):
                        yield f"{start}{matrix}{after}".removesuffix(".weight"), replace(place, matrix=matrix)

    def _gathered_in(self, name: str) -> Iterator[tuple[str, str]]:
        """(former name of a weight that lies in a parameter, or of the first of a stack; what follows its number)."""
        for converter in self._converters:
            target = converter.target_patterns[0]
            for pattern in converter.source_patterns if name.endswith(target) else ():
                before, _, after = pattern.replace("\\.", ".").partition("*")
                number = "0" if after else ""
                yield f"{name.removesuffix(target)}{before}{number}{after}", after

    def _older(self, name: str) -> Iterator[str]:
        """The name of a weight before all renamings, before each of them alone, and as it is, if layers have such."""
        plain = name.removeprefix(self.prefix)
        names = [
            self._rename(plain, self._back, [])[0],
            *(self._rename(plain, [one], [])[0] for one in self._back),
            plain,
        ]
        for one in dict.fromkeys(names):
            if one.endswith(".weight"):
                yield f"{self.prefix}{one}"


def former_names(model: nn.Module) -> list[FormerNames]:
    """What transformers knows of the former names in a model: one entry for each of its models in it.

    Empty without one, and with a transformers that has no such table.
    """
    table, rules, models = (sys.modules.get(name) for name in (_TABLE, _RULES, _MODELS))
    if table is None or rules is None or models is None:
        return []
    outermost: list[str] = []
    for path, module in modules_outside(model):
        prefix = f"{path}." if path else ""
        if isinstance(module, models.PreTrainedModel) and not prefix.startswith(tuple(outermost)):
            outermost.append(prefix)
    return [FormerNames(model.get_submodule(prefix[:-1]), prefix, table, rules) for prefix in outermost]


def place_of(names: Iterable[FormerNames], former: str) -> Place | None:
    """Where the weight that once had this full name is now; None if no one knows."""
    return next((place for one in names if (place := one.place(former)) is not None), None)


def former_layers(names: Iterable[FormerNames]) -> dict[Place, list[str]]:
    """The paths that layers had, the oldest first, by where their weights are now."""
    found: dict[Place, list[str]] = {}
    for one in names:
        for path, place in one.layers():
            found.setdefault(place, []).append(path)
    return found

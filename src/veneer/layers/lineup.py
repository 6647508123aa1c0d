"""Which adapters on a layer are multiplied together, for one batch, and their stacked factors.

Within one call of generate, which runs each layer once a token, both are kept. They are made anew as soon as anything
they follow from is another tensor, or has changed as far as torch counts changes (`Tensor._version`). What it does not
count, writing through `.data`, is seen from the next call on: nothing is kept beyond a call.
Shapes: I in, O out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer
from veneer.layers.kinds.kind import last_dimension, linear_base_update, linear_update
from veneer.layers.part import Part
from veneer.layers.route import Step
from veneer.layers.row_groups import Groups, groups_for
from veneer.layers.stacked import Stack, stacked

Served = tuple[Adapter, Part]
Plan = tuple[Step, ...]

# How many numbers of padding cost as much as one more product does: what is read in the time that its calls take.
PADDING = 2**17
# How many bytes of stacked factors a call keeps on all layers; what is beyond is stacked anew each time.
KEPT_BYTES = 2**31

_version = attrgetter("_version")
_settings = itemgetter("scale", "training", "casts_input")


@dataclass(eq=False)
class Team:
    """Adapters on one layer that are multiplied together: they share a dtype and, about, a rank.

    rank    the largest of theirs
    p       the probability of their dropout
    groups  of their rows, by the number of tokens that a row has
    kept    the stack for these groups
    """

    rank: int
    p: float
    adapters: list[Adapter] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    groups: dict[int, Groups] = field(default_factory=dict)
    kept: tuple[Groups, Stack] | None = None


@dataclass(eq=False)
class Lineup:
    """The adapters of a plan on one layer, in teams, and those that are left to themselves.

    state  what all of this follows from; None if it is for once
    """

    teams: list[Team]
    alone: list[Served]
    state: "State | None" = None

    def stack(self, team: Team, layer: Layer, x: Tensor, keeping: "Keeping | None") -> tuple[Groups, Stack]:
        """The groups of rows for this input, and the factors for them."""
        first = team.parts[0]
        first.check(x)
        tokens = x.numel() // (first.batch * x.shape[-1])
        groups = team.groups.get(tokens)
        if groups is None:
            groups = team.groups[tokens] = groups_for(tuple(team.parts), tokens, team.rank, x.device)
        if team.kept is not None and team.kept[0] is groups:
            return team.kept
        keeping = None if self.state is None else keeping
        made = groups, stacked(team.adapters, groups, first.batch, layer, lasting=keeping is not None)
        if keeping is not None:
            keeping.keep(team, made)
        return made


@dataclass(eq=False)
class State:
    """What the lineup of a layer follows from, as it was.

    found     the adapters that the layer had under the names of the plan
    settings  theirs, read from `owners`
    tables    where their tensors are, and the layer's own
    values    what is there
    versions  of the tensors
    """

    layer: Layer
    plan: Plan
    names: list[str]
    found: list[Adapter | None]
    owners: list[dict[str, Any]]
    settings: list[tuple[Any, ...]]
    tables: list[dict[str, Any]]
    values: list[Tensor | None]
    tensors: list[Tensor]
    versions: list[int]

    @classmethod
    def of(cls, layer: Layer, plan: Plan) -> "State | None":
        """The state as it is now; None if changes of it could not be told."""
        names = [step.name for step in plan]
        found = list(map(layer.adapters._modules.get, names))
        there: list[Adapter] = [adapter for adapter in found if adapter is not None]
        tables: list[dict[str, Any]] = [adapter._parameters for adapter in there]
        tables += [adapter._buffers for adapter in there if adapter._buffers["start_A"] is not None]
        tables += [layer._parameters] if any(adapter.rule == "dora" for adapter in there) else []
        values = list(_all_values(tables))
        scales = [adapter.scale for adapter in there if isinstance(adapter.scale, Tensor)]
        tensors = [value for value in values if value is not None] + scales
        if any(adapter.training for adapter in there) or any(value.is_inference() for value in tensors):
            return None
        owners = list(map(vars, there))
        settings, versions = list(map(_settings, owners)), list(map(_version, tensors))
        return cls(layer, plan, names, found, owners, settings, tables, values, tensors, versions)

    def holds(self, layer: Layer, plan: Plan) -> bool:
        """Whether everything is as it was. This runs for each layer and token, so it loops in C."""
        return (
            layer is self.layer
            and plan is self.plan
            and all(map(is_, map(layer.adapters._modules.get, self.names), self.found))
            and list(map(_settings, self.owners)) == self.settings
            and all(map(is_, _all_values(self.tables), self.values))
            and list(map(_version, self.tensors)) == self.versions
        )


def _all_values(tables: Iterable[dict[str, Any]]) -> Iterator[Tensor | None]:
    return chain.from_iterable(map(dict.values, tables))


@dataclass(eq=False)
class Keeping:
    """What one call keeps: lineups by the layer's id, and how many bytes their stacks have."""

    lineups: dict[int, Lineup] = field(default_factory=dict)
    nbytes: int = 0

    def keep(self, team: Team, made: tuple[Groups, Stack]) -> None:
        """Keep a team's stack in the place of the one it had, if there is room."""
        self.drop(team)
        if self.nbytes + made[1].nbytes <= KEPT_BYTES:
            team.kept = made
            self.nbytes += made[1].nbytes

    def drop(self, team: Team) -> None:
        """Let a team's stack go."""
        if team.kept is not None:
            self.nbytes -= team.kept[1].nbytes
            team.kept = None


def keeping_of(plan: Plan) -> Keeping | None:
    """Where to keep things for the call that this plan is of; None if nothing is to be kept."""
    part = plan[0].part
    if part is None or not part.lasting or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return part.shared("kept", Keeping)


def lineup_of(layer: Layer, plan: Plan, keeping: Keeping | None) -> Lineup:
    """The lineup of a layer: the one that is kept if it still holds."""
    if keeping is None:
        return _line_up(layer, plan)
    kept = keeping.lineups.get(id(layer))
    if kept is not None:
        if kept.state is not None and kept.state.holds(layer, plan):
            return kept
        for team in kept.teams:
            keeping.drop(team)
    state = State.of(layer, plan)  # before the lineup: what changes meanwhile is seen the next time
    made = keeping.lineups[id(layer)] = _line_up(layer, plan)
    made.state = state
    return made


def _line_up(layer: Layer, plan: Plan) -> Lineup:
    table = layer.adapters._modules
    together: dict[Any, list[Served]] = {}
    alone: list[Served] = []
    for step in plan:
        if (adapter := table.get(step.name)) is not None:
            assert step.part is not None
            key = alike(adapter) if type(step.part) is Part and step.part.tokens is None else None
            (alone if key is None else together.setdefault(key, [])).append((adapter, step.part))
    return Lineup([team for (_, p), served in together.items() for team in teams_of(served, p)], alone)


def alike(adapter: Adapter) -> tuple[torch.dtype, float] | None:
    """What adapters must share to be multiplied together, dtype and dropout; None if it cannot be."""
    kind = adapter.kind
    if kind.update is not linear_update or kind.spread is not last_dimension or not adapter.casts_input:
        return None
    p = adapter.dropout if adapter.training else 0.0
    if adapter.rule == "dora" and (p or kind.base_update is not linear_base_update):
        return None  # with dropout it needs the layer's output on what is left of the input
    return adapter._parameters["lora_A"].dtype, p  # type: ignore[union-attr]


def teams_of(served: Iterable[Served], p: float) -> list[Team]:
    """Teams in order of rank. Who joins one is padded with zeros to its largest rank: to twice its own at most, or
    where all zeros together cost less than a product more."""
    ranked = sorted(((rank_of(adapter), adapter, part) for adapter, part in served), key=lambda one: -one[0])
    teams: list[Team] = []
    padding = 0
    for rank, adapter, part in ranked:
        missing = teams[-1].rank - rank if teams else 0
        if missing:
            padding += missing * (adapter.lora_A.shape[1] + adapter.lora_B.shape[0])
        if not teams or (missing > rank and padding > PADDING):
            teams.append(Team(rank, p))
            padding = 0
        teams[-1].adapters.append(adapter)
        teams[-1].parts.append(part)
    return teams


def rank_of(adapter: Adapter) -> int:
    """The rank of the update: twice that of the factors where a start is taken off."""
    A, start = adapter._parameters["lora_A"], adapter._buffers["start_A"]
    assert A is not None
    return A.shape[0] if start is None else A.shape[0] + start.shape[0]

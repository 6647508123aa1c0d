"""What a config would do to a model, as data to print. Needs no weights: a model on the meta device will do."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from veneer.config import LoraConfig
from veneer.layers.replication import replicated
from veneer.layers.sharded import size_of
from veneer.targets.left_out import stacks
from veneer.targets.match import Resolution, resolve
from veneer.targets.site import Site
from veneer.targets.structure import structure_of


@dataclass(frozen=True)
class Preview:
    """The sites a config means, and the counts a reader wants beside them.

    linear_layers  how many layers "all-linear" could adapt, by the last part of their path
    stacks         how many fused experts target_parameters could adapt, by the last two parts of their name
    trainable      trainable numbers: adapters, saved modules and biases
    total          all numbers of the model, with the adapters
    """

    sites: tuple[Site, ...]
    resolution: Resolution
    linear_layers: dict[str, int]
    stacks: dict[str, int]
    trainable: int
    total: int


def preview(model: nn.Module, config: LoraConfig) -> Preview:
    """What `config` would adapt in `model`, without touching it. Raises TargetError with suggestions."""
    with replicated(model, config.layer_replication):
        return _preview(model, config)


def _preview(model: nn.Module, config: LoraConfig) -> Preview:
    resolution = resolve(model, config)
    structure = structure_of(model)
    linear = Counter(path.rpartition(".")[2] for path in structure.linear_layers)
    fused = Counter(".".join(name.split(".")[-2:]) for name in stacks(structure))
    added = sum(site.parameters for site in resolution.sites)
    added += sum(site.parameters for site in resolution.token_rows)
    tied = {path: source for path, source in resolution.tied.items() if path in resolution.saved}
    copied = sum(size_of(p) for path in resolution.saved for p in structure.modules[path].parameters())
    copied -= sum(size_of(structure.modules[path].get_parameter("weight")) for path in tied)  # one copy serves both
    biases = sum(size_of(model.get_parameter(name)) for name in resolution.biases)
    base = sum(map(size_of, model.parameters()))
    return Preview(
        resolution.sites, resolution, dict(linear), dict(fused), added + copied + biases, base + added + copied
    )

"""Fused experts, which "all-linear" leaves out: they are parameters, and no linear layers."""

import warnings

from torch import Tensor

from veneer.config import ALL_LINEAR, LoraConfig
from veneer.errors import VeneerWarning
from veneer.layers.saved_module import CONTAINERS
from veneer.layers.sharded import shape_of, size_of
from veneer.targets.names import inside, selector
from veneer.targets.structure import Structure

_NOTICEABLE = 0.01  # of the model's weights


def stacks(structure: Structure) -> dict[str, Tensor]:
    """The parameters that hold several matrices, as fused experts do, and can be adapted, by their full names."""
    found = {}
    for name in structure.adaptable_parameters:
        owner, _, own = name.rpartition(".")
        weight = structure.modules[owner]._parameters[own]
        assert weight is not None
        shape = shape_of(weight)
        several = len(shape) == 3 and min(shape) > 1  # a position embedding is (1, positions, channels)
        if several and owner not in structure.readers and not isinstance(structure.modules[owner], CONTAINERS):
            found[name] = weight
    return found


def warn_of_stacks(structure: Structure, config: LoraConfig, saved: list[str]) -> None:
    """Say how much "all-linear" leaves out, unless the config names parameters or excludes these."""
    if config.target_parameters or config.target_modules not in (None, ALL_LINEAR):
        return
    drops = selector(config.exclude_modules or [])
    left_out = {
        name: weight
        for name, weight in stacks(structure).items()
        if not inside(name, saved) and not drops(name) and not drops(name.rpartition(".")[0])
    }
    share = sum(map(size_of, left_out.values())) / max(1, structure.size)
    if share < _NOTICEABLE:
        return
    names = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in left_out))
    owners = list(dict.fromkeys(name.split(".")[-2] for name in left_out))
    warnings.warn(
        f"{ALL_LINEAR!r} leaves {100 * share:.0f} % of the weights of {structure.model_name} without an adapter: they "
        f"are {len(left_out)} stacked parameters, such as fused experts, and no linear layers. To adapt them too, set "
        f"target_modules={ALL_LINEAR!r} and target_parameters={names}; to leave them out without this warning, "
        f"exclude_modules={owners}.",
        VeneerWarning,
        stacklevel=5,
    )

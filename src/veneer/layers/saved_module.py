"""Modules trained in full beside the adapters (`modules_to_save`): each adapter owns a copy, the original stays.

The module's class is swapped (see swap.py); its forward hands over to the copy of the last acting adapter that has
one.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from veneer.errors import AttachError
from veneer.layers import swap
from veneer.layers.attach import Adapted
from veneer.layers.kinds import Layer
from veneer.layers.offered import offered
from veneer.layers.peft_names import RouteNames
from veneer.layers.route import Route, Step
from veneer.layers.sharded import gathered
from veneer.layers.twin import bare_twin
from veneer.layers.weights.offloaded import let_go, offloading_hook, real_values, settle

CHILD = "modules_to_save"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Copies(nn.ModuleDict):
    """One full copy of a module for each adapter that trains it, by adapter name."""


class Saved(RouteNames, swap.Front):
    """Placed in front of a module's class: its own forward, or that of the copy that acts."""

    word = "Saved"
    by_rows = True
    _veneer_child = CHILD
    modules_to_save: Copies
    _veneer_route: Route

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the copy that acts, or of the module itself; row by row where adapters serve parts."""
        steps = [step for step in self._veneer_route.plan if step.part is not None and step.part.rows is not None]
        if steps:
            return self._by_parts(steps, *args, **kwargs)
        copy = acting_copy(self)
        return super().forward(*args, **kwargs) if copy is None else copy(*args, **kwargs)

    @offered
    def original_module(self: Any) -> nn.Module:
        """The module itself without the copies, over the same parameters."""
        return bare_twin(self, CHILD)

    def _by_parts(self, steps: list[Step], *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)
        for step in steps:
            if step.name not in self.modules_to_save:
                continue
            if len(args) + len(kwargs) != 1 or not isinstance(y, Tensor):
                raise AttachError(
                    f"{swap.base_class(self).__name__} is trained in full and takes more than one input or returns "
                    "more than one tensor, so it cannot serve each row by its own adapter. Use set_adapter."
                )
            assert step.part is not None
            settle(self.modules_to_save[step.name])
            copy, x = self.modules_to_save[step.name], args[0] if args else next(iter(kwargs.values()))
            rows = step.part.on_all_tokens()  # an adapter's invocation is about its update, not about its copies
            y = rows.through(lambda x, y, copy=copy: copy(x).to(y.dtype), x, y)
        return y


class SavedSequential(Saved):
    """The same for `nn.Sequential`, which runs what it iterates over: the copies are not part of that."""

    def __iter__(self) -> Iterator[nn.Module]:
        return (module for module in self._modules.values() if not isinstance(module, Copies))  # type: ignore[misc]

    def __len__(self) -> int:
        return sum(1 for _ in self)


def acting_copy(module: Saved) -> nn.Module | None:
    """The copy that stands in for the module now, that of the last adapter which has one; None if it is itself."""
    for name in reversed(module._veneer_route.acting):
        if name in module.modules_to_save:
            copy = module.modules_to_save[name]
            settle(copy)
            return copy
    return None


def is_saved(module: nn.Module) -> bool:
    """Whether an adapter trains this module in full."""
    return isinstance(module, Saved)


def original_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and persistent buffers by name, without the copies."""
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if not name.startswith(f"{CHILD}.")}


def keep_copy(module: Layer, name: str, route: Route, *, weight: nn.Parameter | None = None) -> None:
    """Give adapter `name` its own trainable copy of the module.

    weight  that of another copy, which this one shares (`ensure_weight_tying`)

    Raises AttachError if something other than accelerate has replaced the module's forward.
    """
    copy = _plain_copy(module, {} if weight is None else {id(module.weight): weight})
    copy.requires_grad_(True)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(copy, hooks).clear()  # they run on the module itself already
    if not is_saved(module):
        front = SavedSequential if isinstance(module, nn.Sequential) else Saved
        swap.lay_over(module, front, CHILD, Copies(), route)
    copies: Any = module.modules_to_save
    copies[name] = copy
    route.may_train.add(name)


def _plain_copy(module: Layer, shared: dict[int, Any]) -> Layer:
    """A copy of the original module alone; `shared` is what to put in place of some of its parts, by id."""
    spared = {**_offloaded_parts(module), **shared}
    if is_saved(module):
        spared |= {id(module.modules_to_save): Copies(), id(module._veneer_route): Route()}
    with gathered(module):
        copy = deepcopy(module, spared)
    if is_saved(module):
        swap.take_away(copy)
        del copy.modules_to_save
        del copy._veneer_route
    for part in copy.modules():
        if offloading_hook(part) is not None:
            let_go(part)
    return copy


def _offloaded_parts(module: nn.Module) -> dict[int, Any]:
    """What a copy gets in place of what is offloaded: the values themselves, and no copy of the map they come from."""
    found: dict[int, Any] = {}
    for part in module.modules():
        own = {**part._buffers, **part._parameters}
        for name, value in real_values(part):
            found[id(own[name])] = nn.Parameter(value.clone()) if name in part._parameters else value.clone()
        if offloading_hook(part) is not None:
            found[id(vars(part)["_hf_hook"])] = vars(part)["_hf_hook"]
    return found


def drop_copy(module: Layer, name: str) -> None:
    """Forget adapter `name`'s copy. With the last one the module is what it was before."""
    if is_saved(module):
        swap.forget(module, CHILD, name)


def contains_adapted(module: nn.Module) -> bool:
    """Whether the module is, or holds, a layer that another adapter adapts."""
    return any(isinstance(child, Adapted) for child in module.modules())

"""Attach and detach adapters, and choose which act. Plan, then act: nothing changes if anything is wrong.

Threads may do so at once, for one model or several: what looks at a model and then changes it is `one_at_a_time`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar

from torch import Generator, Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import AttachError, MergeError
from veneer.layers import attach, by_weight, fused, saved_module, shared_input, token_rows
from veneer.layers.replication import replicated, replication_of
from veneer.layers.sharded import any_partitioned, reshard
from veneer.layers.stand_in import StandIns
from veneer.layers.walk import finder, modules_outside
from veneer.layers.weights import keep_order
from veneer.model.checkpointing import protect_checkpointing, unprotect_checkpointing
from veneer.model.invocation import follow_invocations
from veneer.model.make import Made, first_rows, new_adapter, saved_adapter, tied_adapter
from veneer.model.overlay import (
    Overlay,
    at_ends_trains,
    hang,
    overlay_made_for,
    overlay_needed,
    own_parameters,
    take_down,
)
from veneer.model.plan import Plan, plan
from veneer.model.renamed.targets import with_names_of_today
from veneer.model.sharded import check_whole, follow_zero3
from veneer.model.statistics import forget_statistics, kept_statistics
from veneer.model.tensors import copy_besides_factors
from veneer.model.waiting import stop_waiting, wait_for_data
from veneer.targets import Resolution

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
# One lock for all models: hung on a model, it would have to be copied and pickled with it.
_CHANGING = RLock()


def one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let one thread at a time run the functions decorated so; they may call each other."""

    @wraps(function)
    def alone(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _CHANGING:
            return function(*args, **kwargs)

    return alone


@one_at_a_time
def add_adapter(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    *,
    float32: bool = True,
    generator: Generator | None = None,
) -> None:
    """Attach a new adapter to a model. The first one freezes the base and becomes active; others wait.

    float32  keep the adapter in float32 over a half-precision base, as training needs

    Raises what `plan` raises, and then nothing has changed.
    """
    todo = plan(model, name, with_names_of_today(model, config))
    carry_out(model, todo, float32=float32, generator=generator)


@one_at_a_time
def carry_out(
    model: nn.Module,
    todo: Plan,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    float32: bool = True,
    generator: Generator | None = None,
) -> None:
    """Attach what was planned. If it fails half way, for want of memory say, it is taken off again.

    tensors  the adapter's values by their names in an adapter file, already checked; None to initialise
    """
    with replicated(model, todo.config.layer_replication) as stack:
        _carry_out(model, todo, tensors, float32, generator)
        stack.keep()


def _carry_out(
    model: nn.Module, todo: Plan, tensors: Mapping[str, Tensor] | None, float32: bool, generator: Generator | None
) -> None:
    name, overlay = todo.name, overlay_made_for(model)
    first, find = not overlay.configs, finder(model)
    with plain_base(model, overlay):
        made = _made(model, find, todo, tensors, float32, generator)
        rows = [(site, first_rows(model, site, float32=float32)) for site in todo.resolution.token_rows]
    try:
        for one in made:
            layer = find(one.site.path)
            if one.site.by_weight:
                by_weight.attach(layer, name, one.adapter, overlay.route, one.site.parameter)
            else:
                attach.attach(layer, name, one.adapter, overlay.route)
        for path in todo.resolution.saved:
            source = todo.resolution.tied.get(path)
            weight = None if source is None else find(source).get_parameter(f"{saved_module.CHILD}.{name}.weight")
            saved_module.keep_copy(find(path), name, overlay.route, weight=weight)
        for site, trained in rows:
            for path in site.paths:
                token_rows.keep_rows(find(path), name, trained, overlay.route)
        fused.follow_adapters(model)
        shared_input.introduce(find, (one.site.path for one in made))
        if any_partitioned(model.parameters()):
            follow_zero3(model)
    except BaseException:
        _take_off(model, name, todo.resolution)
        raise
    _ready_base(model, overlay, trains=not todo.config.inference_mode)
    if todo.resolution.biases:
        overlay.biases[name] = StandIns(model, todo.resolution.biases)
    bases = {f"{one.site.path}.{one.site.parameter}": one.base for one in made if one.base is not None}
    if bases:
        overlay.bases[name] = StandIns(model, bases, bases)
    overlay.configs[name] = todo.config
    overlay.resolutions[name] = todo.resolution
    overlay.trainable[name] = not todo.config.inference_mode
    hang(model, overlay)
    follow_invocations(model, overlay)
    if tensors is not None:
        copy_besides_factors(model, name, tensors)
    else:
        forget_statistics(model, todo.config)
        wait_for_data(model, name)
    protect_checkpointing(model)
    activate(model, (name,)) if first else _let_wait(model, overlay, name)


def _ready_base(model: nn.Module, overlay: Overlay, *, trains: bool) -> None:
    """Freeze it before the first adapter, and let it pass gradients on before the first that trains."""
    if not overlay.configs:
        _freeze_base(model)
    if trains and not any(overlay.trainable.values()):
        for _, module in modules_outside(model):
            keep_order(module)


def _freeze_base(model: nn.Module) -> None:
    """Let nothing train but what adapters have, whose part `activate` decides."""
    for _, module in modules_outside(model):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)


def _let_wait(model: nn.Module, overlay: Overlay, name: str) -> None:
    """Let a new adapter neither act nor train. The others' gradients stay: who froze a part of one meant it."""
    for parameter in own_parameters(model, name):
        parameter.requires_grad_(False)
    overlay.route.may_train.discard(name)
    overlay.route.set()
    place_stand_ins(model, overlay)


def _made(
    model: nn.Module,
    find: Callable[[str], nn.Module],
    todo: Plan,
    tensors: Mapping[str, Tensor] | None,
    float32: bool,
    generator: Generator | None,
) -> list[Made]:
    """The adapters of all sites. Raises ConfigError if the initialisation cannot start on one."""
    sites, config = [site for site in todo.resolution.sites if site.tied_to is None], todo.config
    if tensors is not None:
        made = [saved_adapter(find(site.path), site, config, tensors, float32=float32) for site in sites]
    else:
        stats = kept_statistics(model, config, [site.path for site in sites])
        made = [
            new_adapter(find(site.path), site, config, stats=stats.get(site.path), float32=float32, generator=generator)
            for site in sites
        ]
    adapters = {one.site.path: one.adapter for one in made}
    tied = (site for site in todo.resolution.sites if site.tied_to is not None)
    return [*made, *(tied_adapter(site, adapters[str(site.tied_to)]) for site in tied)]


@one_at_a_time
def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off the model. With the last one nothing of Veneer is left on it, and the base is as it was."""
    overlay = overlay_needed(model)
    overlay.check_names([name])
    if name in overlay.route.in_weights:
        raise MergeError(f"Adapter {name!r} cannot be removed while it is merged: call unmerge_adapter() first.")
    check_whole(model, f"Adapter {name!r} cannot be removed", "Let it rest (set_adapter, disable_adapter).")
    forget_adapter(model, overlay, name)
    if overlay.configs:
        activate(model, tuple(other for other in overlay.route.active if other != name))


def forget_adapter(model: nn.Module, overlay: Overlay, name: str) -> None:
    """Take off what there is of an adapter, which may be less than there was; which others act stays to be said."""
    for stand_ins in (overlay.biases, overlay.bases):
        if name in stand_ins:
            stand_ins.pop(name).act(model, False, trainable=False)
    overlay.configs.pop(name, None)
    overlay.trainable.pop(name, None)
    _take_off(model, name, overlay.resolutions.pop(name))
    for site in overlay.idle.pop(name, ()):
        attach.detach(model.get_submodule(site.path), name)
    follow_invocations(model, overlay)
    stop_waiting(model, overlay, name)
    if not overlay.configs:
        unprotect_checkpointing(model)
        take_down(model)
        if (stack := replication_of(model)) is not None:
            stack.take_back(model)


def _take_off(model: nn.Module, name: str, resolution: Resolution) -> None:
    find = finder(model)
    for site in resolution.sites:
        attach.detach(find(site.path), name)
    for path in resolution.saved:
        saved_module.drop_copy(find(path), name)
    for site in resolution.token_rows:
        for path in site.paths:
            token_rows.drop_rows(find(path), name)
    fused.follow_adapters(model)


@one_at_a_time
def activate(model: nn.Module, names: Iterable[str]) -> None:
    """Let these adapters act, in this order, and only them train.

    Raises AdapterNameError for an unknown name, or AttachError if two of them have replaced the same weight.
    """
    overlay, names = overlay_needed(model), tuple(names)
    overlay.check_names(names)
    check_bases(overlay, names)
    overlay.route.set(active=names)
    follow_route(model, overlay)


def check_bases(overlay: Overlay, names: Iterable[str]) -> None:
    """Raise AttachError if two of these adapters have replaced the same weight, as LoftQ does."""
    owners: dict[str, str] = {}
    for name in names:
        for weight in overlay.bases[name].names if name in overlay.bases else ():
            if weight in owners:
                raise AttachError(
                    f"Adapters {owners[weight]!r} and {name!r} have each replaced {weight} "
                    "(init_lora_weights='loftq'), and only one can stand there: let one of them act at a time."
                )
            owners[weight] = name


@one_at_a_time
def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Let the chosen adapters act, or none; merged weights stay (see `merge.disable`)."""
    overlay = overlay_needed(model)
    overlay.route.set(enabled=enabled)
    place_stand_ins(model, overlay)


def follow_route(model: nn.Module, overlay: Overlay) -> None:
    """Make gradients and biases agree with the active adapters.

    Adapters that rest were frozen when they came to: of those only the first and last layers are looked at, which tell
    whether somebody let them all train by hand.
    """
    reshard(model)
    route, find = overlay.route, finder(model)
    training = {name for name in route.active if overlay.trainable[name]}
    concerned = (
        n for n in overlay.configs if n in training or n in route.may_train or at_ends_trains(overlay, n, find)
    )
    for name in concerned:
        wanted = name in training
        for parameter in own_parameters(model, name):
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
    route.may_train = training
    place_stand_ins(model, overlay)


def place_stand_ins(model: nn.Module, overlay: Overlay) -> None:
    """Give the base the biases and weights that go with the adapters that act: first off, then on, for one weight."""
    for name, biases in overlay.biases.items():
        acting = name in overlay.route.acting
        biases.act(model, acting, trainable=acting and overlay.trainable[name])
    for now in (False, True):
        for name, bases in overlay.bases.items():
            if (name in overlay.route.acting) == now:
                bases.act(model, now, trainable=False)
    overlay.route.replacing = frozenset((*overlay.biases, *overlay.bases))
    overlay.route.standing = tuple(name for name in (*overlay.biases, *overlay.bases) if name in overlay.route.acting)


@contextmanager
def plain_base(model: nn.Module, overlay: Overlay) -> Iterator[None]:
    """Within the block every weight of the base is its own, whatever stands in for it outside."""
    for bases in overlay.bases.values():
        bases.act(model, False, trainable=False)
    try:
        yield
    finally:
        place_stand_ins(model, overlay)

"""Fold adapters into the weights, and take them out again exactly.

Sums are made in float64 on a CPU, else in float32, and rounded once. All or nothing: every merged weight is checked
before the first one is put in place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from veneer.errors import MergeError, bullet_list, shortened
from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer
from veneer.layers.merging import check_merge, merge_here, merged_values, unmerge_here
from veneer.layers.peft_names import WeightNames
from veneer.layers.replication import replication_of
from veneer.layers.route import as_names
from veneer.layers.walk import finder, modules_outside
from veneer.layers.weights import Loss, is_offloaded, kept, put_back, write
from veneer.model.apply import check_bases, one_at_a_time, place_stand_ins, remove_adapter, set_enabled
from veneer.model.merge_shared import Sources, check_rows, merged_rows, one_with, put_merged, sources_of
from veneer.model.overlay import Overlay, adapters_by_site, overlay_needed, overlay_of, saved_modules
from veneer.model.sharded import check_whole

_MERGE_ELSEWHERE = "Save the adapter (save_pretrained) and merge it into the plain model, or on disk: `veneer merge`."
Losses = dict[str, Loss]  # what rounding again costs, by the layer's path


@one_at_a_time
def merge(model: nn.Module, names: Sequence[str] | None = None, losses: Losses | None = None) -> tuple[str, ...]:
    """Fold adapters (the active ones, unless named) into the weights until `unmerge`; returns their names.

    losses  where it is put down what it costs to round quantised weights again; None if that is not allowed

    Those that are merged stay so, as if all had been merged at once. Keeps the base weights, which takes as much memory
    as the adapted layers. Raises AdapterNameError or MergeError, and then nothing has changed.
    """
    overlay = overlay_needed(model)
    if (before := overlay.route.merged) and (more := _besides(overlay, names)):
        return _merge_besides(model, before, more, losses)
    names = checked_names(model, overlay, names)
    with _standing_in(model, overlay, names):
        merged = dict(_merged_parameters(model, names, losses=losses))
    overlay.requantize = losses is not None
    overlay.route.set(merged=names)
    place_stand_ins(model, overlay)  # before the merged weights are there, which none of them stands in for
    sources, find = sources_of(model, names), finder(model)
    for (path, parameter), value in merged.items():
        for tied in one_with(sources, path):
            overlay.originals[tied, parameter] = kept(find(tied), parameter)
        put_merged(find, sources, path, parameter, value)
    return names


def _besides(overlay: Overlay, names: Sequence[str] | None) -> tuple[str, ...]:
    """Those of the adapters to merge that are not merged yet."""
    wanted = overlay.route.active if names is None else as_names(names)
    overlay.check_names(wanted)
    return tuple(name for name in wanted if name not in overlay.route.in_weights)


def _merge_besides(
    model: nn.Module, before: tuple[str, ...], more: tuple[str, ...], losses: Losses | None
) -> tuple[str, ...]:
    again = _as_before(model)
    unmerge(model)
    try:
        return merge(model, (*before, *more), losses)
    except BaseException:
        merge(model, before, again)
        raise


def _as_before(model: nn.Module) -> Losses | None:
    """What `merge` is given so that it may do again what is merged now."""
    return {} if overlay_needed(model).requantize else None


@one_at_a_time
def unmerge(model: nn.Module) -> None:
    """Put the base weights back, bit for bit. Raises MergeError if nothing is merged."""
    overlay = overlay_needed(model)
    if not overlay.route.in_weights:
        raise MergeError("Nothing is merged.")
    for layer, _ in merged_by_themselves(model, overlay):
        unmerge_here(layer)
    find = finder(model)
    for (path, parameter), original in overlay.originals.items():
        put_back(find(path), parameter, original)
    overlay.originals.clear()
    overlay.requantize = False
    overlay.route.set(merged=())
    place_stand_ins(model, overlay)


def merged_by_themselves(model: nn.Module, overlay: Overlay) -> list[tuple[Layer, tuple[str, ...]]]:
    """(layer, adapters) of each layer that has adapters in its weights by itself, as by diffusers' `fuse_lora`."""
    if not overlay.route.merged_on:
        return []
    layers = (module for _, module in modules_outside(model) if isinstance(module, WeightNames))
    return [(layer, layer._veneer_merged.names) for layer in layers if layer._veneer_merged is not None]


@one_at_a_time
def disable(model: nn.Module) -> None:
    """Let the model be the base model: what is merged is taken out, and no adapter acts until it is enabled again."""
    if overlay_needed(model).route.in_weights:
        unmerge(model)
    set_enabled(model, False)


@contextmanager
def base_in_place(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base model; afterwards what acted acts again, merged or not.

    Adapters may be removed inside. Merging inside is refused.
    """
    overlay = overlay_of(model)
    if overlay is None:
        yield
        return
    enabled, merged, apart = overlay.route.enabled, overlay.route.merged, merged_by_themselves(model, overlay)
    losses = _as_before(model)
    disable(model)
    try:
        yield
    finally:
        if overlay_of(model) is overlay:
            set_enabled(model, enabled)
            if merged and enabled and set(merged) <= overlay.configs.keys():
                merge(model, merged, losses)
            _merge_again(apart if enabled else [])


def _merge_again(apart: list[tuple[Layer, tuple[str, ...]]]) -> None:
    """Let layers have those adapters in their weights by themselves again that there still are."""
    for layer, names in apart:
        if isinstance(layer, WeightNames) and (left := [name for name in names if layer._veneer_has(name)]):
            merge_here(layer, left)


@one_at_a_time
def merge_and_remove(model: nn.Module, names: Sequence[str] | None = None, losses: Losses | None = None) -> nn.Module:
    """Fold adapters (the merged or active ones, unless named) into the weights for good, and take every adapter off.

    losses  as for `merge`

    Returns the same model. Weights are checked in a first pass and written in a second, layer by layer, so that no
    second model is held. Raises AdapterNameError, AttachError or MergeError, and then nothing has changed.
    """
    overlay = overlay_needed(model)
    before, apart = overlay.route.merged, merged_by_themselves(model, overlay)
    names, again = before if before and names is None else names, _as_before(model)
    if before or apart:
        unmerge(model)
    try:
        names = checked_names(model, overlay, names)
        with _standing_in(model, overlay, names):
            _check_merge(model, names, requantize=losses is not None)
    except BaseException:
        if before:
            merge(model, before, again)
        _merge_again(apart)
        raise
    overlay.route.set(active=names)
    place_stand_ins(model, overlay)
    sources, find = sources_of(model, names), finder(model)
    for (path, parameter), value in _merged_parameters(model, names, checked=True, losses=losses):
        put_merged(find, sources, path, parameter, value)
    for name in names:
        for _, module in saved_modules(model, name):
            _take_over(module, module.modules_to_save[name])
    biases = {
        path: value.detach()
        for name in names
        if name in overlay.biases
        for path, value in overlay.biases[name].values(model).items()
    }
    overlay.bases.clear()  # what stood in for a weight is part of the merged one
    stack = replication_of(model)
    if stack is not None:
        stack.settle()
    remove_all(model)
    for path, value in biases.items():
        model.get_parameter(path).data = value.clone()
    model.requires_grad_(False)
    return model


@one_at_a_time
def remove_all(model: nn.Module) -> nn.Module:
    """Take every adapter off without merging; returns the same model, as it was before the first one, still frozen."""
    overlay = overlay_needed(model)
    if overlay.route.in_weights:
        unmerge(model)
    for name in list(overlay.configs):
        remove_adapter(model, name)
    return model


def checked_names(model: nn.Module, overlay: Overlay, names: Sequence[str] | None) -> tuple[str, ...]:
    """The adapters to merge: these, or the active ones. Raises AdapterNameError or MergeError if they cannot be."""
    check_whole(model, "Nothing was merged", _MERGE_ELSEWHERE, MergeError)
    names = overlay.route.active if names is None else tuple(as_names(names))
    overlay.check_names(names)
    if overlay.route.in_weights:
        already = ", ".join(map(repr, overlay.route.in_weights))
        raise MergeError(f"{already} is merged already: call unmerge_adapter() first.")
    if not overlay.route.enabled:
        raise MergeError("The adapters are disabled: enable them before merging.")
    if not names:
        raise MergeError("No adapter is active: name those to merge.")
    if invoked := [name for name in names if name in overlay.route.invoked]:
        raise MergeError(
            f"Adapter {invoked[0]!r} acts from its alora_invocation_tokens on only, and merged weights would act on "
            "every token: it cannot be merged."
        )
    check_bases(overlay, names)
    check_rows(model, names)
    owners: dict[str, str] = {}
    for name in names:
        for path, _ in saved_modules(model, name):
            if path in owners:
                raise MergeError(
                    f"Adapters {owners[path]!r} and {name!r} both train {path} in full; only one can be merged."
                )
            owners[path] = name
    return names


@contextmanager
def _standing_in(model: nn.Module, overlay: Overlay, names: tuple[str, ...]) -> Iterator[None]:
    """Within the block the base has the values that go with these adapters."""
    try:
        with overlay.route.following(names, ()):
            place_stand_ins(model, overlay)
            yield
    finally:
        place_stand_ins(model, overlay)


def _check_merge(model: nn.Module, names: Sequence[str], *, requantize: bool) -> None:
    """Raise what merging would raise; almost always without making the sums."""
    sources = sources_of(model, names)
    for _ in merged_rows(model, names, sources):
        pass
    problems, find = [], finder(model)
    for (path, parameter), adapters in _adapters_by_weight(model, names, sources).items():
        try:
            check_merge(find(path), parameter, adapters, path, requantize=requantize)
        except MergeError as problem:
            problems.append(str(problem))
    _raise_all(problems)


def _merged_parameters(
    model: nn.Module, names: Sequence[str], *, checked: bool = False, losses: Losses | None = None
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """((path, name), merged value) of each parameter concerned, one at a time.

    Raises MergeError naming the layers that cannot take the adapter in, or whose weights would overflow.
    """
    sources = sources_of(model, names)
    yield from merged_rows(model, names, sources)
    problems, find = [], finder(model)
    for (path, parameter), adapters in _adapters_by_weight(model, names, sources).items():
        try:
            values = merged_values(find(path), parameter, adapters, path, checked=checked, losses=losses)
        except MergeError as problem:
            problems.append(str(problem))
            continue
        yield from (((path, name), value) for name, value in values.items())
    _raise_all(problems)


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        raise MergeError(
            bullet_list(f"Not merged: {len(problems)} weight(s) cannot take the adapter in:", shortened(problems))
        )


def _adapters_by_weight(
    model: nn.Module, names: Sequence[str], sources: Sources
) -> dict[tuple[str, str], list[Adapter]]:
    """The adapters on each weight, but for those that are merged in the weight they are tied to."""
    found: dict[tuple[str, str], list[Adapter]] = {}
    for name in names:
        for site, adapter in adapters_by_site(model, name):
            if site.path in sources:
                continue
            found.setdefault((site.path, site.parameter), []).append(adapter)
    return found


def _take_over(module: nn.Module, copy: nn.Module) -> None:
    """Give a module the parameters and buffers of its copy, as its own: a tie to another module ends here."""
    for path, trained in copy.named_modules():
        own: Layer = module.get_submodule(path)
        for name, value in trained._parameters.items():
            if value is not None and is_offloaded(own, name):
                write(own, name, value)
            else:
                own._parameters[name] = value
        own._buffers.update(trained._buffers)

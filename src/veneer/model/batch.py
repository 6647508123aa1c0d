"""Which part of a batch each adapter serves, for one call of a model's forward or generate.

`adapter_names` gives each row its adapter. Where the rows are grouped, once for all layers, nothing else has to know.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from veneer.errors import AdapterNameError, ArgumentError, AttachError, MergeError, bullet_list, shortened
from veneer.layers.part import parts_of
from veneer.layers.route import BASE
from veneer.layers.swap import front_of
from veneer.model.invocation import Offsets, arguments, prompted
from veneer.model.overlay import Overlay, overlay_needed, overlay_of
from veneer.model.row_order import layers_without_rows
from veneer.targets import Resolution

# The arguments that have one entry for each row of the batch, the surest first.
_BATCHES = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "decoder_input_ids")


@contextmanager
def serving(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    adapter_names: Sequence[str] | None = None,
    alora_offsets: Offsets | None = None,
    generating: bool = False,
) -> Iterator[None]:
    """Within the block, which is one call of forward or generate with these arguments, adapters serve their parts.

    adapter_names  the adapter of each row, `"__base__"` for none
    alora_offsets  for each row, how many of its last tokens an activated adapter acts on, or None

    In training each adapter gets the gradients of its rows, if it may train: `set_adapter` with all of their names
    sees to that, or `set_requires_grad`. Everything is checked before anything changes; afterwards what acted acts
    again, also after an error.

    Raises AdapterNameError, ArgumentError, AttachError or MergeError.
    """
    overlay = overlay_of(model)
    prompts = generating and overlay is not None and overlay.route.invoked
    if adapter_names is None and alora_offsets is None and not prompts:
        yield
        return
    overlay = overlay_needed(model)
    given = arguments(model, args, kwargs, generating=generating)
    with ExitStack() as stack:
        if adapter_names is not None:
            names = _checked(model, overlay, adapter_names, given)
            stack.enter_context(_rows(overlay, names, lasting=generating))
        stack.enter_context(prompted(overlay, given, alora_offsets, generating=generating))
        yield


@contextmanager
def _rows(overlay: Overlay, names: list[str], *, lasting: bool) -> Iterator[None]:
    route, distinct = overlay.route, set(names)
    if len(distinct) == 1:
        acting = tuple(distinct - {BASE})
        block = route.following(acting, tuple(map(route.step, acting)))
    else:
        block = route.serving(parts_of([None if name == BASE else name for name in names], lasting=lasting))
    with block:
        yield


def _checked(model: nn.Module, overlay: Overlay, adapter_names: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """The names, one for each row, all of adapters that can serve rows of a batch."""
    if not isinstance(adapter_names, list | tuple) or not all(isinstance(name, str) for name in adapter_names):
        raise ArgumentError(f"adapter_names must be a list with a name for each row of the batch: {adapter_names!r}")
    names = list(adapter_names)
    distinct = [name for name in dict.fromkeys(names) if name != BASE]
    overlay.check_names(distinct)
    batch = _batch(given)
    if batch is not None and batch.shape[0] != len(names):
        raise AdapterNameError(
            f"adapter_names has {len(names)} names, but the batch has {batch.shape[0]} rows: give one for each row, "
            f"{BASE!r} for no adapter."
        )
    if overlay.route.in_weights:
        merged = ", ".join(map(repr, overlay.route.in_weights))
        raise MergeError(f"{merged} is merged, so it would act on every row: call unmerge_adapter() first.")
    if not overlay.route.enabled:
        raise AttachError("The adapters are disabled, so adapter_names would have no effect: enable them first.")
    _refuse_changed_base(overlay, distinct)
    if len(set(names)) > 1:
        problems = [problem for name in distinct for problem in _why_not_by_rows(model, overlay, name, given)]
        if problems:
            raise AttachError(
                bullet_list("Adapters cannot be chosen row by row (use set_adapter):", shortened(problems))
            )
    return names


def _refuse_changed_base(overlay: Overlay, distinct: list[str]) -> None:
    """Biases and weights of the base are one for all rows."""
    for stand_ins, what in (
        (overlay.biases, "trains biases of the base"),
        (overlay.bases, "has replaced weights of the base"),
    ):
        for name in stand_ins:
            if name in distinct:
                raise AttachError(
                    f"Adapter {name!r} {what}, which all rows of a batch share: use set_adapter for a batch of its own."
                )
            if name in overlay.route.acting:
                raise AttachError(
                    f"Adapter {name!r}, active now, {what}, which all rows of a batch share: activate another one with "
                    "set_adapter before you use adapter_names."
                )


def _why_not_by_rows(model: nn.Module, overlay: Overlay, name: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Where the adapter lies on layers that do not see row after row."""
    resolution = overlay.resolutions[name]
    looked_at, problems = overlay.not_by_rows.get(name, (None, ()))
    if looked_at is not resolution:
        found = (*layers_without_rows(model, resolution.sites), *_fronts_without_rows(model, resolution))
        problems = tuple(f"{name!r} adapts {problem}" for problem in found)
        overlay.not_by_rows[name] = resolution, problems
    yield from problems
    if any(key.endswith("grid_thw") and value is not None for key, value in given.items()):
        for site in resolution.sites:
            if "visual" in site.path or "vision" in site.path:
                yield f"{name!r} adapts {site.path}: it sees patches of images of several rows, one after the other"


def _fronts_without_rows(model: nn.Module, resolution: Resolution) -> Iterator[str]:
    for site in resolution.sites:
        front = front_of(model.get_submodule(site.path))
        if not site.by_weight and (front is None or not front.by_rows):
            yield f"{site.path}, whose adapters serve whole batches only"


def _batch(given: Mapping[str, Any]) -> Tensor | None:
    """The argument whose first dimension is the rows of the batch; None if no tensor was given."""
    known = (given.get(name) for name in _BATCHES)
    tensors = (value for value in (*known, *given.values()) if isinstance(value, Tensor) and value.dim())
    return next(tensors, None)

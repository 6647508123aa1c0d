"""Fold adapters into the weights, and take them out again exactly.

Sums are made in float64 on a CPU, else in float32, and rounded once. All or nothing: every merged weight is checked
before the first one is put in place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer.errors import MergeError, bullet_list
from veneer.layers.attach import Adapted
from veneer.layers.kinds import Layer
from veneer.layers.weights import is_offloaded, read, store_of
from veneer.model.apply import place_biases, remove_adapter, set_enabled
from veneer.model.overlay import Overlay, overlay_needed, overlay_of, saved_modules


def merge(model: nn.Module, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Fold adapters (the active ones, unless named) into the weights until `unmerge`; returns their names.

    Keeps the base weights, which takes as much memory as the adapted layers. Raises AdapterNameError or MergeError,
    and then nothing has changed.
    """
    overlay = overlay_needed(model)
    names = _checked(model, overlay, names)
    for path, weight in dict(_merged_weights(model, names)).items():
        layer: Layer = model.get_submodule(path)
        overlay.originals[path] = layer._parameters["weight"]
        store_of(layer).write(layer, weight)
    overlay.route.set(merged=names)
    place_biases(model, overlay)
    return names


def unmerge(model: nn.Module) -> None:
    """Put the base weights back, bit for bit. Raises MergeError if nothing is merged."""
    overlay = overlay_needed(model)
    if not overlay.route.merged:
        raise MergeError("Nothing is merged.")
    for path, original in overlay.originals.items():
        layer: Layer = model.get_submodule(path)
        dtype, device = layer.weight.dtype, layer.weight.device
        if (original.dtype, original.device) != (dtype, device):  # the model was moved or cast while merged
            original.data = original.data.to(device, dtype)
        layer._parameters["weight"] = original
    overlay.originals.clear()
    overlay.route.set(merged=())
    place_biases(model, overlay)


def disable(model: nn.Module) -> None:
    """Let the model be the base model: what is merged is taken out, and no adapter acts until it is enabled again."""
    if overlay_needed(model).route.merged:
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
    enabled, merged = overlay.route.enabled, overlay.route.merged
    disable(model)
    try:
        yield
    finally:
        if overlay_of(model) is overlay:
            set_enabled(model, enabled)
            if merged and enabled and set(merged) <= overlay.configs.keys():
                merge(model, merged)


def merge_and_remove(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Fold adapters into the weights for good and take every adapter off; returns the same model.

    Weights are checked in a first pass and written in a second, layer by layer, so that no second model is held.
    Raises AdapterNameError or MergeError, and then nothing has changed.
    """
    overlay = overlay_needed(model)
    if overlay.route.merged:
        unmerge(model)
    names = _checked(model, overlay, names)
    for _ in _merged_weights(model, names):
        pass
    for path, weight in _merged_weights(model, names):
        layer: Layer = model.get_submodule(path)
        store_of(layer).write(layer, weight)
    for name in names:
        for _, module in saved_modules(model, name):
            _take_over(module, module.modules_to_save[name])
    kept = {
        path: value
        for name in names
        if name in overlay.biases
        for path, value in overlay.biases[name].trained(model).items()
    }
    remove_all(model)
    for path, value in kept.items():
        model.get_parameter(path).data = value.clone()
    model.requires_grad_(False)
    return model


def remove_all(model: nn.Module) -> nn.Module:
    """Take every adapter off without merging; returns the same model, as it was before the first one, still frozen."""
    overlay = overlay_needed(model)
    if overlay.route.merged:
        unmerge(model)
    for name in list(overlay.configs):
        remove_adapter(model, name)
    return model


def _checked(model: nn.Module, overlay: Overlay, names: Sequence[str] | None) -> tuple[str, ...]:
    names = overlay.route.active if names is None else tuple(names)
    overlay.check_names(names)
    if overlay.route.merged:
        already = ", ".join(map(repr, overlay.route.merged))
        raise MergeError(f"{already} is merged already: call unmerge_adapter() first.")
    if not overlay.route.enabled:
        raise MergeError("The adapters are disabled: enable them before merging.")
    if not names:
        raise MergeError("No adapter is active: name those to merge.")
    owners: dict[str, str] = {}
    for name in names:
        for path, _ in saved_modules(model, name):
            if path in owners:
                raise MergeError(
                    f"Adapters {owners[path]!r} and {name!r} both train {path} in full; only one can be merged."
                )
            owners[path] = name
    return names


def _merged_weights(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """(path, merged weight) of each layer concerned. Raises MergeError naming the weights that would overflow."""
    broken = []
    for path, layer in model.named_modules():
        if not isinstance(layer, Adapted):
            continue
        mine = [layer.adapters[name] for name in names if name in layer.adapters]
        if not mine:
            continue
        if is_offloaded(layer):
            raise MergeError(f"The weight of {path} is offloaded: load the model without offloading to merge.")
        with torch.no_grad():
            weight = read(layer)
            base = weight.to(torch.float64 if weight.device.type == "cpu" else torch.float32)
            total = base
            for adapter in mine:
                total = adapter.merged(total, base)
            merged = total.to(weight.dtype)
        if merged.isfinite().all():
            yield path, merged
        else:
            broken.append(f"{path} ({weight.dtype})")
    if broken:
        raise MergeError(
            bullet_list(
                f"Not merged: {len(broken)} weight(s) would hold NaN or infinity. The adapter is broken, or its update "
                "is too large for the dtype of the base (merge over a float32 base then):",
                broken[:6],
            )
        )


def _take_over(module: nn.Module, copy: nn.Module) -> None:
    """Give a module the parameters and buffers of its copy, as its own: a tie to another module ends here."""
    for path, trained in copy.named_modules():
        own = module.get_submodule(path)
        for table in ("_parameters", "_buffers"):
            getattr(own, table).update(getattr(trained, table))

"""LoftQ for a base that is quantised already: factors that make up for what it lost. Shapes: I in, O out, R rank.

Li et al. 2023, https://arxiv.org/abs/2310.08659, one step: base + s · B A is as near to the original as it can be.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import AdapterFileError, ConfigError, MergeError, bullet_list
from veneer.init.loftq import fit
from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer
from veneer.layers.weights import read
from veneer.model.measure.observe import bare_model
from veneer.model.overlay import DEFAULT, adapters_by_site, overlay_needed
from veneer.storage.checkpoint import Checkpoint, cached_checkpoint, open_checkpoint
from veneer.targets import Site

Callback = Callable[[Any, str], bool]


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = DEFAULT,
    callback: Callback | None = None,
) -> None:
    """Fit the adapter to what the base lost by quantisation, or by anything else that tells it from the original.

    model_path  where the original weights are: a safetensors file, an index of shards, or a folder. By default the
                folder or hub id the base was loaded from; nothing is downloaded. Weights are read one at a time
    callback    (model, layer's path) -> whether to keep what was just done to this layer; so a layer that makes the
                model's answers worse keeps its old factors (greedily, one after the other)

    Layers whose weight is the original one are left alone. Raises AdapterNameError, AdapterFileError, ConfigError or
    MergeError, and then nothing has changed.
    """
    model = bare_model(peft_model)
    overlay = overlay_needed(model)
    overlay.check_names([adapter_name])
    if overlay.route.in_weights:
        raise MergeError("Unmerge the adapters first: the weights are not the base's just now.")
    if overlay.bases and overlay.route.acting != (adapter_name,):
        raise MergeError(
            f"Another adapter has replaced weights of the base: call set_adapter({adapter_name!r}) first, so that the "
            "base is the one this adapter goes with."
        )
    found = list(adapters_by_site(model, adapter_name))
    _refuse_unfit(model, found)
    checkpoint = open_checkpoint(_location(model, model_path, overlay.configs[adapter_name].base_model_name_or_path))
    names = _names(model, checkpoint, [site for site, _ in found])
    before: list[tuple[Adapter, list[Tensor]]] = []
    try:
        for site, adapter in found:
            layer: Layer = model.get_submodule(site.path)
            fitted = _fitted(layer, site, adapter, checkpoint.read(names[site.path]))
            if fitted is None:
                continue
            before.append((adapter, _values(adapter)))
            _write(adapter, fitted)
            if callback is not None and not _kept(callback(peft_model, site.path)):
                _write(*before[-1])
    except BaseException:
        for adapter, values in before:
            _write(adapter, values)
        raise
    if not before:
        raise ConfigError(
            f"No weight differs from the original in {checkpoint.location}: there is nothing that LoftQ could make up "
            "for. Is the base loaded quantised, and is this the original?"
        )


def _refuse_unfit(model: nn.Module, found: Sequence[tuple[Site, Adapter]]) -> None:
    problems = []
    for site, adapter in found:
        if not site.kind.by_matrix:
            problems.append(f"{site.path}: an adapter on {site.kind.name} does not start from a matrix")
        elif site.kind.groups(model.get_submodule(site.path)) > 1:
            problems.append(f"{site.path}: the weight of a grouped convolution is no matrix")
        elif adapter.start_A is not None:
            problems.append(f"{site.path}: its adapter takes its start off the base")
        elif site.rank > min(site.shape):
            problems.append(f"{site.path}: a weight of shape {site.shape} has no {site.rank} singular values")
    if problems:
        raise ConfigError(bullet_list("LoftQ cannot start these layers:", problems[:6]))


def _location(model: nn.Module, path: str | Path | None, base: str | None) -> Path:
    if path is not None:
        return Path(path)
    name = vars(model).get("name_or_path") or base
    if not name:
        raise AdapterFileError("The model does not say where it was loaded from: give model_path.")
    if Path(name).exists():
        return Path(name)
    cached = cached_checkpoint(name)
    if cached is None:
        raise AdapterFileError(
            f"The original weights of {name} are neither a folder nor in the hub's cache: download them "
            f"(hf download {name}), or give model_path."
        )
    return cached


def _names(model: nn.Module, checkpoint: Checkpoint, sites: Sequence[Site]) -> dict[str, str]:
    """{path of a layer: the name of its weight in the checkpoint}, which may be with or without the model's prefix."""
    prefix = getattr(model, "base_model_prefix", "") or ""
    names, problems = {}, []
    for site in sites:
        name = f"{site.path}.{site.parameter}"
        known = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        found = next((candidate for candidate in known if candidate in checkpoint.tensors), None)
        layer: Layer = model.get_submodule(site.path)
        if found is None:
            problems.append(f"missing      {name}")
        elif checkpoint.tensors[found].shape != tuple(read(layer, site.parameter).shape):
            problems.append(f"wrong shape  {found} {list(checkpoint.tensors[found].shape)}")
        else:
            names[site.path] = found
    if problems:
        shown = problems if len(problems) <= 6 else [*problems[:6], f"… and {len(problems) - 6} more"]
        raise AdapterFileError(bullet_list(f"{checkpoint.location} holds other weights than the model's:", shown))
    return names


def _fitted(layer: Layer, site: Site, adapter: Adapter, original: Tensor) -> list[Tensor] | None:
    """New values of A and B, and of DoRA's magnitude if there is one; None if nothing was lost."""
    W = read(layer, site.parameter).detach()
    W, dtype = W.to(torch.promote_types(W.dtype, torch.float32)), adapter.lora_A.dtype
    rest = original.to(W) - W
    if not rest.isfinite().all():
        raise ConfigError(f"{site.path}: there is NaN or infinity in the weight, or in the original one.")
    if not rest.any():
        return None
    factors = fit(site.kind.to_matrix(rest), site.rank, scale=site.scale)
    A, B = (X.to(dtype).reshape(shape) for X, shape in zip(factors, site.factors, strict=True))
    if adapter.lora_magnitude_vector is None:
        return [A, B]
    total = W + site.kind.weight_delta(A.to(W.dtype), B.to(W.dtype), site.scale, W.shape)
    return [A, B, site.kind.row_norms(total).to(dtype)]


def _values(adapter: Adapter) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in _parameters(adapter)]


def _write(adapter: Adapter, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(_parameters(adapter), values, strict=True):
        parameter.copy_(value)


def _parameters(adapter: Adapter) -> list[nn.Parameter]:
    magnitude = adapter.lora_magnitude_vector
    return [adapter.lora_A, adapter.lora_B, *([] if magnitude is None else [magnitude])]


def _kept(answer: object) -> bool:
    if answer is None:
        raise ConfigError("The callback answered nothing: it must return True to keep a layer's new factors, or False.")
    return bool(answer)

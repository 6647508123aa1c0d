"""An adapter on a model, seen as the tensors of an adapter file: names, shapes and values."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.layers.saved_module import original_parameters
from veneer.model.overlay import adapted_layers, overlay_of, saved_modules
from veneer.storage import keys
from veneer.targets import Resolution, Site


def factor_keys(site: Site) -> tuple[str, str]:
    """The names of A and B of a site."""
    name_A, name_B = site.kind.on_disk
    return keys.factor(site.path, name_A), keys.factor(site.path, name_B)


def bias_key(resolution: Resolution, name: str) -> str:
    """The name of a trained bias, given its parameter's name in the model."""
    path = name.rpartition(".")[0]
    return keys.bias(path, adapted=any(site.path == path for site in resolution.sites))


def expected_shapes(model: nn.Module, resolution: Resolution) -> dict[str, tuple[int, ...]]:
    """Every tensor that a file of this adapter must hold, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in resolution.sites:
        out_features, in_features = site.shape
        key_A, key_B = factor_keys(site)
        shapes[key_A] = (site.rank, in_features)
        shapes[key_B] = (out_features, site.rank)
        if site.dora:
            shapes[keys.magnitude(site.path)] = (out_features,)
    for path in resolution.saved:
        for name, parameter in original_parameters(model.get_submodule(path)):
            shapes[keys.saved(path, name)] = tuple(parameter.shape)
    for name in resolution.biases:
        shapes[bias_key(resolution, name)] = tuple(model.get_parameter(name).shape)
    return shapes


def repeated_keys(model: nn.Module, resolution: Resolution) -> dict[str, str | None]:
    """Names under which PEFT repeats what the file or the base holds, each with the base parameter it must equal.

    Those with None repeat another tensor of the file.
    """
    repeated: dict[str, str | None] = {}
    for site in resolution.sites:
        repeated[keys.base_weight(site.path)] = f"{site.path}.weight"
    for path in resolution.saved:
        for name, _ in original_parameters(model.get_submodule(path)):
            copied, original = keys.inside_saved(path, name)
            repeated[copied] = None
            repeated[original] = f"{path}.{name}"
    return repeated


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The values of adapter `name` by their names in an adapter file: the tensors themselves, not copies."""
    overlay = overlay_of(model)
    assert overlay is not None
    resolution = overlay.resolutions[name]
    sites = {site.path: site for site in resolution.sites}
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model, name):
        adapter = layer.adapters[name]
        key_A, key_B = factor_keys(sites[path])
        tensors[key_A] = adapter.lora_A.detach()
        tensors[key_B] = adapter.lora_B.detach()
        if adapter.lora_magnitude is not None:
            tensors[keys.magnitude(path)] = adapter.lora_magnitude.detach()
    for path, module in saved_modules(model, name):
        for parameter_name, parameter in module.modules_to_save[name].named_parameters():
            tensors[keys.saved(path, parameter_name)] = parameter.detach()
    if name in overlay.biases:
        for parameter_name, value in overlay.biases[name].trained().items():
            tensors[bias_key(resolution, parameter_name)] = value
    return tensors


def copy_tensors(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked values, by their names in an adapter file, into an adapter that is on the model."""
    overlay = overlay_of(model)
    assert overlay is not None
    with torch.no_grad():
        for key, value in adapter_tensors(model, name).items():
            value.copy_(tensors[key])

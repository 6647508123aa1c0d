"""An adapter on a model, seen as the tensors of an adapter file: names, shapes and values."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.layers import attach, saved_module
from veneer.layers.saved_module import original_state
from veneer.model.overlay import adapted_layers, overlay_needed, saved_modules
from veneer.storage import keys
from veneer.storage.adapter_file import Expected
from veneer.targets import Resolution, Site
from veneer.targets.structure import embeddings


def factor_keys(site: Site) -> tuple[str, str]:
    """The names of A and B of a site."""
    name_A, name_B = site.kind.on_disk
    return keys.factor(site.path, name_A), keys.factor(site.path, name_B)


def bias_key(resolution: Resolution, name: str) -> str:
    """The name of a trained bias, given its parameter's name in the model."""
    path = name.rpartition(".")[0]
    return keys.bias(path, adapted=any(site.path == path for site in resolution.sites))


def expected_tensors(model: nn.Module, resolution: Resolution) -> dict[str, Expected]:
    """Every tensor that a file of this adapter must hold."""
    expected: dict[str, Expected] = {}
    for site in resolution.sites:
        out_features, in_features = site.shape
        key_A, key_B = factor_keys(site)
        expected[key_A] = Expected((site.rank, in_features))
        expected[key_B] = Expected((out_features, site.rank))
        if site.dora:
            expected[keys.magnitude(site.path)] = Expected((out_features,))
    for path in resolution.saved:
        for name, value in original_state(model.get_submodule(path)).items():
            expected[keys.saved(path, name)] = Expected(tuple(value.shape), value.is_floating_point())
    for name in resolution.biases:
        expected[bias_key(resolution, name)] = Expected(tuple(model.get_parameter(name).shape))
    return expected


def repeated_keys(model: nn.Module, resolution: Resolution) -> dict[str, str | None]:
    """Names under which PEFT repeats what the file or the base holds, each with the base parameter it must equal.

    Those with None repeat another tensor of the file.
    """
    repeated: dict[str, str | None] = {}
    for path in embeddings(model):
        repeated[keys.saved(path, "weight")] = f"{path}.weight"
    for site in resolution.sites:
        repeated[keys.base_weight(site.path)] = f"{site.path}.weight"
    for path in resolution.saved:
        for name in original_state(model.get_submodule(path)):
            copied, original = keys.inside_saved(path, name)
            repeated[copied] = None
            repeated[original] = f"{path}.{name}"
    return repeated


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The values of adapter `name` by their names in an adapter file: the tensors themselves, not copies."""
    overlay = overlay_needed(model)
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
        for inner, value in module.modules_to_save[name].state_dict().items():
            tensors[keys.saved(path, inner)] = value
    if name in overlay.biases:
        for parameter_name, value in overlay.biases[name].trained(model).items():
            tensors[bias_key(resolution, parameter_name)] = value
    return tensors


def tensors_from_state(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of adapter `name` out of a state dict of the model, by their names in an adapter file.

    The names may begin with `base_model.model.`, as those of a PeftModel do.
    """
    overlay = overlay_needed(model)
    resolution = overlay.resolutions[name]
    plain = {key.removeprefix(keys.PREFIX): value for key, value in state.items()}
    names: dict[str, str] = {}
    for site in resolution.sites:
        key_A, key_B = factor_keys(site)
        names[key_A] = f"{site.path}.{attach.CHILD}.{name}.lora_A"
        names[key_B] = f"{site.path}.{attach.CHILD}.{name}.lora_B"
        names[keys.magnitude(site.path)] = f"{site.path}.{attach.CHILD}.{name}.lora_magnitude"
    for path in resolution.saved:
        for inner in original_state(model.get_submodule(path)):
            names[keys.saved(path, inner)] = f"{path}.{saved_module.CHILD}.{name}.{inner}"
    names |= {bias_key(resolution, bias): bias for bias in resolution.biases}
    return {key: plain[in_model] for key, in_model in names.items() if in_model in plain}


def copy_tensors(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked values, by their names in an adapter file, into an adapter that is on the model."""
    with torch.no_grad():
        for key, value in adapter_tensors(model, name).items():
            value.copy_(tensors[key])

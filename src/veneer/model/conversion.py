"""An adapter of any kind made into a plain LoRA of scale 1, under PEFT's names: for servers that know nothing else, or
for a lower rank. DoRA's magnitudes, starts taken off the base and rsLoRA's scale all become part of the factors.

Shapes: I in, O out, R rank.
"""

from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import ConfigError, MergeError, bullet_list
from veneer.functional.combine import Update
from veneer.functional.combine_svd import filled
from veneer.functional.extract import Extraction, check_rank, extract
from veneer.layers.adapter import Adapter
from veneer.model.apply import plain_base
from veneer.model.config_for import config_for
from veneer.model.extraction import ExtractedLora, LayerFit, check_sites, factor_tensors, named_errors, shown
from veneer.model.methods import AdapterMethods
from veneer.model.overlay import DEFAULT, adapters_by_site, overlay_needed
from veneer.model.start import START
from veneer.model.tensors import adapter_tensors, site_keys
from veneer.model.updates import difference_made, is_product, update_of, why_not_update
from veneer.targets import Site


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = DEFAULT,
    progressbar: bool = False,
    compile_kwargs: None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The plain LoRA nearest to an adapter of the model: its config, and its values by their names in an adapter file.

    rank  an integer: of every layer, filled with zeros above what the adapter has. A float above 0 and at most 1: on
          each layer the lowest that holds this fraction of the squared singular values of its update

    The scale that the adapter has now is in the factors; lora_alpha = r. Biases and modules trained in full are taken
    over. compile_kwargs is there for PEFT's callers and must be None. `save_as_lora` also says how near it comes;
    `extract_lora` does the same for a model trained in full.

    Raises AdapterNameError, ConfigError, or MergeError if a weight that DoRA needs cannot be read.
    """
    found = _converted(model, rank, adapter_name, progressbar, compile_kwargs)
    return found.config, found.tensors


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = DEFAULT,
    progressbar: bool = False,
    compile_kwargs: None = None,
) -> ExtractedLora:
    """Write what `convert_to_lora` makes to an adapter folder; returns it with the relative error of each layer.

    Raises what `convert_to_lora` raises, and AdapterFileError.
    """
    found = _converted(model, rank, adapter_name, progressbar, compile_kwargs)
    found.save(path)
    return found


@torch.no_grad()
def _converted(model: nn.Module, rank: int | float, name: str, progressbar: bool, compile_kwargs: Any) -> ExtractedLora:
    check_rank(rank)
    if compile_kwargs is not None:
        raise ConfigError(f"compile_kwargs={compile_kwargs!r}: nothing here is compiled; leave it out.")
    model = model.bare if isinstance(model, AdapterMethods) else model
    overlay = overlay_needed(model)
    overlay.check_names([name])
    config, resolution = overlay.configs[name], overlay.resolutions[name]
    problems = why_not_update(model, name)
    if problems:
        raise ConfigError(bullet_list("There is no plain LoRA that does the same:", problems))
    if overlay.route.in_weights:
        raise MergeError(f"Unmerge {', '.join(overlay.route.in_weights)} first: the weights are not the base's now.")
    check_sites(resolution.sites, rank)
    fits, tensors = [], _without_factors(model, name)
    with plain_base(model, overlay):
        for site, adapter in shown(adapters_by_site(model, name), progressbar):
            found, norm = _nearest(model, site, adapter, rank)
            fits.append(LayerFit(site.path, found.rank, norm, found.error))
            tensors |= factor_tensors(model, site, found)
            if adapter.lora_bias is not None:
                tensors[site_keys(site)["lora_bias"]] = adapter.lora_bias.detach() * adapter.scale
    plain = config_for(
        model,
        {fit.path: fit.rank for fit in fits},
        saved=resolution.saved,
        modules_to_save=config.modules_to_save,
        bias=config.bias,
        lora_bias=config.lora_bias,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=config.fan_in_fan_out,
        inference_mode=True,
    )
    return ExtractedLora(plain, tensors, tuple(fits))


def _without_factors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Copies of the biases and modules that the adapter trains in full."""
    sites = overlay_needed(model).resolutions[name].sites
    of_sites = {key for site in sites for key in site_keys(site).values()}
    values = adapter_tensors(model, name).items()
    return {key: value.clone() for key, value in values if key.removesuffix(START) not in of_sites}


def _nearest(model: nn.Module, site: Site, adapter: Adapter, rank: int | float) -> tuple[Extraction, float]:
    """The factors nearest to an update, in the adapter's dtype, and the norm of the update."""
    if is_product(site):
        return _of_product(site, update_of(model, site, adapter), rank)
    D_OI = difference_made(model, site, adapter)
    return named_errors(site, lambda: extract(D_OI, rank, dtype=adapter.lora_A.dtype)), D_OI.norm().item()


def _of_product(site: Site, update: Update, rank: int | float) -> tuple[Extraction, float]:
    """The same without the (O, I) matrix.

    With B = Q_B T_B and Aᵀ = Q_A T_A, the decomposition of B A is that of the small T_B T_Aᵀ, rotated.
    """
    wide = torch.float64 if update.A.device.type == "cpu" else torch.float32
    A_RI, B_OR = update.A.flatten(1).to(wide), update.B.flatten(1).to(wide) * update.scale
    Q_OR, T_BR = torch.linalg.qr(B_OR)
    Q_IR, T_AR = torch.linalg.qr(A_RI.T)
    small = T_BR @ T_AR.T
    highest = min(small.shape)
    found = named_errors(site, lambda: extract(small, min(int(rank), highest) if isinstance(rank, Integral) else rank))
    R = int(rank) if isinstance(rank, Integral) else found.rank
    A, B = (t.to(update.A.dtype) for t in filled(found.A @ Q_IR.T, Q_OR @ found.B, R))
    norm = small.norm().item()
    missing = _product_norm(torch.cat([A_RI, A.to(wide)]), torch.cat([B_OR, -B.to(wide)], 1))
    return Extraction(A, B, missing / norm if norm > 0 else 0.0), norm


def _product_norm(A_RI: Tensor, B_OR: Tensor) -> float:
    """‖B A‖ (Frobenius)."""
    _, T_BR = torch.linalg.qr(B_OR, mode="r")
    _, T_AR = torch.linalg.qr(A_RI.T, mode="r")
    return (T_BR @ T_AR.T).norm().item()

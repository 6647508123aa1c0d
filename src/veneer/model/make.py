"""Make the adapter of one site: a new one, or one with the values of an adapter file. Attaches nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from veneer.config import LoraConfig
from veneer.init import Factors, Weight, initialise
from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer
from veneer.layers.weights import home, read, stored
from veneer.model.tensors import site_keys
from veneer.targets import Site

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Made:
    """An adapter for a site, and the weight it wants the base to have there, or None if the base stays."""

    site: Site
    adapter: Adapter
    base: Tensor | None = None


def new_adapter(
    model: nn.Module, site: Site, config: LoraConfig, *, float32: bool = True, generator: Generator | None = None
) -> Made:
    """A new adapter, as `init_lora_weights` says it starts.

    float32  keep it in float32 over a half-precision base
    """
    layer: Layer = model.get_submodule(site.path)
    dtype, device = _dtype(stored(layer, site.parameter), float32), home(layer, site.parameter)
    weight = Weight(*site.shape, device, lambda: site.kind.to_matrix(read(layer, site.parameter)))
    made = initialise(_init_name(site, config), weight, site.rank, generator=generator)
    A, B = (value.to(dtype).reshape(shape) for value, shape in zip((made.A, made.B), site.factors, strict=True))
    bias = torch.zeros(site.shape[0], device=device, dtype=dtype) if site.bias else None
    magnitude = None
    if site.dora:
        W = read(layer, site.parameter).detach().to(dtype)
        magnitude = site.kind.row_norms(W + site.kind.weight_delta(A, B, site.scale, W.shape))
    adapter = Adapter(site.kind, Factors(A, B), scale=site.scale, dropout=site.dropout, magnitude=magnitude, bias=bias)
    return Made(site, adapter)


def saved_adapter(model: nn.Module, site: Site, tensors: Mapping[str, Tensor], *, float32: bool = True) -> Made:
    """An adapter with the values of a file, already checked, by their names there."""
    layer: Layer = model.get_submodule(site.path)
    dtype, device = _dtype(stored(layer, site.parameter), float32), home(layer, site.parameter)
    values = {part: tensors[key].to(device, dtype) for part, key in site_keys(site).items()}
    adapter = Adapter(
        site.kind,
        Factors(values["lora_A"], values["lora_B"]),
        scale=site.scale,
        dropout=site.dropout,
        magnitude=values["lora_magnitude"].flatten() if site.dora else None,
        bias=values.get("lora_bias"),
    )
    return Made(site, adapter)


def _init_name(site: Site, config: LoraConfig) -> str:
    choice = config.init_lora_weights
    if isinstance(choice, bool):
        return site.kind.inits[0 if choice else 1]
    return choice if site.kind.by_matrix else site.kind.inits[0]


def _dtype(weight: Tensor, float32: bool) -> torch.dtype:
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2 or (float32 and dtype in _HALF):
        return torch.float32
    return dtype

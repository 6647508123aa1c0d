"""Make the adapter of one site: a new one, or one with the values of an adapter file. Attaches nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator, Tensor, nn

from veneer.config import LoraConfig
from veneer.config.init_names import FROZEN, OPTIONS_FIELD
from veneer.errors import AttachError, ConfigError
from veneer.init import STARTS_BY_INPUTS, Factors, Measured, Weight, initialise
from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer
from veneer.layers.saved_module import original_state
from veneer.layers.token_rows import TokenRows
from veneer.layers.walk import finder
from veneer.layers.weights import home, read, stored
from veneer.model.start import takes_off_its_start
from veneer.model.tensors import bias_key, site_keys
from veneer.storage import keys
from veneer.targets import Resolution, Site, TokenSite

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Made:
    """An adapter for a site, and the weight it wants the base to have there, or None if the base stays."""

    site: Site
    adapter: Adapter
    base: Tensor | None = None


def new_adapter(
    layer: Layer,
    site: Site,
    config: LoraConfig,
    *,
    stats: Measured | None = None,
    float32: bool = True,
    generator: Generator | None = None,
) -> Made:
    """A new adapter for a layer, as `init_lora_weights` says it starts.

    stats    what was measured for this layer, if the initialisation needs that
    float32  keep it in float32 over a half-precision base
    """
    dtype, device = _dtype(stored(layer, site.parameter), float32), home(layer, site.parameter)
    made = _started(layer, site, config, stats, generator)
    A, B = (value.to(dtype).reshape(shape) for value, shape in zip((made.A, made.B), site.factors, strict=True))
    bias = torch.zeros(site.shape[0], device=device, dtype=dtype) if site.bias else None
    base = _base(layer, site, made)
    magnitude = None
    if site.dora:
        W = (read(layer, site.parameter) if base is None else base).detach().to(dtype)
        V = W if made.subtract else W + site.kind.weight_delta(A, B, site.scale, W.shape)
        magnitude = site.kind.row_norms(V)
    adapter = Adapter(
        site.kind,
        Factors(A, B),
        scale=site.scale,
        dropout=site.dropout,
        magnitude=magnitude,
        bias=bias,
        start=Factors(A.clone(), B.clone()) if made.subtract else None,
        frozen=made.frozen,
    )
    return Made(site, adapter, base)


def saved_adapter(
    layer: Layer, site: Site, config: LoraConfig, tensors: Mapping[str, Tensor], *, float32: bool = True
) -> Made:
    """An adapter with the values of a file, already checked, by their names there.

    What the initialisation once did to the base is done again, where the config says that the file goes with that.
    """
    dtype, device = _dtype(stored(layer, site.parameter), float32), home(layer, site.parameter)
    if device.type == "meta":
        raise AttachError(
            f"{site.name} is on the meta device, without values, and the saved adapter's would be lost there. Load the "
            "base first; for a base that is sharded before it is loaded, attach a new adapter, call "
            "veneer.distributed.load_base, then model.load_adapter(folder, adapter_name)."
        )
    values = {part: tensors[key].to(device, dtype) for part, key in site_keys(site).items()}
    start, base = None, None
    if config.init_lora_weights == "loftq" or takes_off_its_start(config):
        made = _started(layer, site, config, None, None)
        if made.subtract:
            A, B = (value.to(dtype).reshape(shape) for value, shape in zip((made.A, made.B), site.factors, strict=True))
            start = Factors(A, B)
        base = _base(layer, site, made)
    adapter = Adapter(
        site.kind,
        Factors(values["lora_A"], values["lora_B"]),
        scale=site.scale,
        dropout=site.dropout,
        magnitude=values["lora_magnitude_vector"].flatten() if site.dora else None,
        bias=values.get("lora_bias"),
        start=start,
        frozen=FROZEN.get(str(config.init_lora_weights), ()),
    )
    return Made(site, adapter, base)


def tied_adapter(site: Site, source: Adapter) -> Made:
    """The adapter of a site that is tied to another: the parameters are that one's."""
    shared = Factors(source.lora_A.detach(), source.lora_B.detach())
    adapter = Adapter(site.kind, shared, scale=site.scale, dropout=site.dropout, frozen=source.frozen)
    adapter.lora_A, adapter.lora_B = source.lora_A, source.lora_B
    return Made(site, adapter)


def first_rows(model: nn.Module, site: TokenSite, *, float32: bool = True) -> TokenRows:
    """The rows of a token site as they start: the embedding's own."""
    layer: Layer = model.get_submodule(site.path)
    weight = read(layer)
    tokens = torch.tensor(site.tokens, device=weight.device)
    return TokenRows(site.tokens, weight.detach()[tokens].to(_dtype(weight, float32)))


def saved_dtypes(
    model: nn.Module, resolution: Resolution, tensors: Mapping[str, Tensor], *, float32: bool = True
) -> dict[str, torch.dtype]:
    """The dtypes that the values of a file get when they are attached, by their names there.

    Those of factors are left out where none of them can get a narrower one.
    """
    dtypes: dict[str, torch.dtype] = {}
    wide = not float32 or any(value.dtype is torch.float64 for value in tensors.values())
    find = finder(model)
    for site in resolution.sites if wide else ():
        dtype = _dtype(stored(find(site.path), site.parameter), float32)
        dtypes |= dict.fromkeys(site_keys(site).values(), dtype)
    for path in resolution.saved:
        state = original_state(model.get_submodule(path))
        dtypes |= {keys.saved(path, name): value.dtype for name, value in state.items()}
    for name in resolution.biases:
        dtypes[bias_key(resolution, name)] = model.get_parameter(name).dtype
    for site in resolution.token_rows:
        dtypes[keys.token_rows(site.path)] = _dtype(stored(model.get_submodule(site.path)), float32)
    return dtypes


def _started(
    layer: Layer, site: Site, config: LoraConfig, stats: Measured | None, generator: Generator | None
) -> Factors:
    """A and B as matrices, as the config's initialisation makes them. Raises ConfigError naming the layer."""
    name = _init_name(site, config, stats)
    options = getattr(config, OPTIONS_FIELD[name]) if name in OPTIONS_FIELD else None
    if site.kind.stack is not None and name in STARTS_BY_INPUTS:
        return _started_at_once(layer, site, name, generator)
    try:
        made = [
            initialise(name, weight, site.rank, scale=site.scale, options=options, stats=stats, generator=generator)
            for weight in _weights(layer, site)
        ]
    except ConfigError as error:
        raise ConfigError(f"{site.name}: {error}") from None
    if site.kind.stack is None:
        return made[0]
    A, B = site.kind.stack.joined([one.A for one in made], [one.B for one in made])
    bases = [one.base for one in made if one.base is not None]
    return replace(made[0], A=A, B=B, base=torch.cat(bases) if bases else None)


def _started_at_once(layer: Layer, site: Site, name: str, generator: Generator | None) -> Factors:
    """The same for every matrix of a stack by one draw, as if they were one matrix with the ranks of all."""
    (rank, in_features), (out_features, _) = site.factors
    weight = Weight(out_features, in_features, home(layer, site.parameter), partial(read, layer, site.parameter))
    return initialise(name, weight, rank, generator=generator)


def _weights(layer: Layer, site: Site) -> Iterator[Weight]:
    """The weight as a matrix, or each of those that are stacked in it: each starts by itself."""
    device, rows = home(layer, site.parameter), site.shape[0] // site.kind.matrices

    def values(first: int) -> Tensor:
        return site.kind.to_matrix(read(layer, site.parameter))[first : first + rows]

    for first in range(0, site.shape[0], rows):
        yield Weight(rows, site.shape[1], device, partial(values, first), site.kind.groups(layer))


def _base(layer: Layer, site: Site, made: Factors) -> Tensor | None:
    if made.base is None:
        return None
    W = read(layer, site.parameter)
    return site.kind.from_matrix(made.base.to(W.dtype), W.shape)


def _init_name(site: Site, config: LoraConfig, stats: Measured | None) -> str:
    choice = config.init_lora_weights
    if choice == "eva" and stats is None:  # waits for its data
        choice = True
    if isinstance(choice, bool):
        return site.kind.inits[0 if choice else 1]
    return choice if site.kind.by_matrix else site.kind.inits[0]


def _dtype(weight: Tensor, float32: bool) -> torch.dtype:
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2 or (float32 and dtype in _HALF):
        return torch.float32
    return dtype

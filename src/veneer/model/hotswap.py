"""Put other values in the place of an adapter's: no layer is touched, so a compiled model need not compile again.

Everything is checked before the first value is written. Shapes: R rank.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import LoraConfig, config_in
from veneer.config.init_names import FROZEN
from veneer.errors import AttachError, ConfigError, MergeError, VeneerWarning, bullet_list, shortened
from veneer.layers.adapter import Adapter
from veneer.layers.attach import adapter_on
from veneer.layers.sharded import has_master
from veneer.layers.walk import finder, modules_outside
from veneer.layers.weights import read
from veneer.model.apply import follow_route, one_at_a_time
from veneer.model.files import read_other
from veneer.model.overlay import DEFAULT, Overlay, adapted_part, adapters_by_site, overlay_needed
from veneer.model.renamed.state import adapter_of_today
from veneer.model.sharded import check_whole
from veneer.model.start import takes_off_its_start
from veneer.model.state_dict import check_state, checked_values, with_prefix
from veneer.model.tensors import besides_factors, check_range, copy_besides_factors, site_keys
from veneer.storage.hub import adapter_folder
from veneer.targets import Resolution, Site, resolve

# Fields that say what else lies on the model: two adapters that differ here are not one in the other's place.
_ALIKE = ("trainable_token_indices", "layer_replication", "ensure_weight_tying", "alora_invocation_tokens")


@one_at_a_time
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str = DEFAULT,
    torch_device: Any = None,
    *,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Replace the values and the config of an adapter by those of a saved one, in place.

    model_name_or_path  an adapter folder, or a hub id with `revision=`, `token=`, `cache_dir=`, … as on the hub
    torch_device        is there for PEFT's callers; values go where their layers are

    Rank, alpha, patterns, rsLoRA and dropout may differ, layer by layer. The new adapter starts at its trained scale.
    A layer that it does not have gets an update of zero; one that only it has is an error, as are other
    modules_to_save, biases, or DoRA on one side alone. Other ranks make a compiled model compile again, unless it
    was prepared (see `prepare_model_for_compiled_hotswap`).

    Raises AdapterNameError, AdapterFileError, ConfigError, TargetError, AttachError, or MergeError while the adapter
    is merged; and then nothing has changed.
    """
    folder = adapter_folder(model_name_or_path, subfolder=subfolder, **hub)
    part = adapted_part(model)
    _check_unmerged(part, adapter_name)
    config = config_in(folder)
    config, resolution, tensors = read_other(part, adapter_name, folder, config)
    _swap(part, adapter_name, config, resolution, tensors)


@one_at_a_time
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same with values in memory, by their names in an adapter file; the adapter's name may stand in them.

    parameter_prefix is there for PEFT's callers. Raises what `hotswap_adapter` raises.
    """
    part = adapted_part(model)
    _check_unmerged(part, adapter_name)
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"config must be a LoraConfig, not {type(config).__name__}.")
    check_state(state_dict)
    named = re.compile(rf"(\.lora_[A-Za-z_]+)\.{re.escape(adapter_name)}((?:\.weight|\.bias)?)$")
    plain = {named.sub(r"\1\2", key): value for key, value in state_dict.items()}
    config, plain = adapter_of_today(part, config, with_prefix(plain))
    resolution = resolve(part, config, strict=False)
    tensors = checked_values(part, resolution, plain, "the config given with it")
    _swap(part, adapter_name, config, resolution, tensors)


@one_at_a_time
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Let a model be compiled once for adapters of different scales and, with `target_rank`, ranks.

    Call it when the first adapter is on the model and before `torch.compile`. Scales become tensors; A and B are
    padded with zeros up to `target_rank`, which changes no output. Files still get the true rank.

    target_rank     the highest rank of the adapters to come; None if all have the one there is
    config          is there for PEFT's callers: configs go on telling the true rank
    check_compiled  "error", "warn" or "ignore" if the model is compiled already

    Raises AdapterNameError, ConfigError, AttachError; and then nothing has changed.
    """
    part = adapted_part(model)
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled={check_compiled!r}: must be 'error', 'warn' or 'ignore'.")
    if target_rank is not None and (isinstance(target_rank, bool) or not isinstance(target_rank, int)):
        raise ConfigError(f"target_rank={target_rank!r}: must be None or a rank, an integer of at least 1.")
    if check_compiled != "ignore" and _is_compiled(model):
        text = "The model is compiled already and will compile again: prepare it before torch.compile."
        if check_compiled == "error":
            raise AttachError(text)
        warnings.warn(text, VeneerWarning, stacklevel=3)
    adapters = [pair for name in overlay_needed(part).configs for pair in adapters_by_site(part, name)]
    wanted = [adapter.lora_A.shape[0] if target_rank is None else target_rank for _, adapter in adapters]
    problems = [
        f"{site.path}: {why}"
        for (site, adapter), rank in zip(adapters, wanted, strict=True)
        if (why := _why_not_padded(adapter, site, rank))
    ]
    if problems:
        raise AttachError(bullet_list(f"Cannot be padded to target_rank={target_rank}:", shortened(problems)))
    padded = [_padded(adapter, rank) for (_, adapter), rank in zip(adapters, wanted, strict=True)]
    for (_, adapter), values in zip(adapters, padded, strict=True):
        with torch.no_grad():
            _write(adapter, values)
        if not isinstance(adapter.scale, Tensor):
            adapter.scale = _as_tensor(adapter.scale, adapter.lora_A.device)


def _as_tensor(scale: float, device: torch.device) -> Tensor:
    """A tensor of no dimensions, in the precision of a float where the device has it."""
    return torch.tensor(scale, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None
        for _, module in modules_outside(model)
    )


def _is_prepared(adapter: Adapter) -> bool:
    return isinstance(adapter.scale, Tensor)


def _why_not_padded(adapter: Adapter, site: Site, rank: int) -> str | None:
    now = adapter.lora_A.shape[0]
    if site.tied_to is not None:
        return f"it shares the adapter of {site.tied_to} (ensure_weight_tying), and padding that is not available"
    if now == rank:
        return None
    if _in_blocks(site):
        return f"the factors of {site.kind.name} are in blocks, and padding those is not available"
    if adapter.start_A is not None:
        return "its start was taken off the base; save and load the adapter first"
    if rank < now:
        return f"it has rank {now} already"
    return None


def _in_blocks(site: Site) -> bool:
    """Whether the factors are in blocks, as those of experts and of convolutions with groups: zeros belong in each."""
    return site.factors[0][0] != site.rank or site.factors[1][1] != site.rank


def _padded(adapter: Adapter, rank: int) -> dict[str, Tensor]:
    """A and B with rows and columns of zeros up to a rank; nothing where they have it."""
    if adapter.lora_A.shape[0] == rank:
        return {}
    return {
        "lora_A": _fill(adapter.lora_A, (rank, *adapter.lora_A.shape[1:])),
        "lora_B": _fill(adapter.lora_B, (adapter.lora_B.shape[0], rank, *adapter.lora_B.shape[2:])),
    }


def _fill(value: Tensor, shape: Iterable[int]) -> Tensor:
    """The value in the first corner of zeros of this shape."""
    whole = value.new_zeros(tuple(shape))
    whole[tuple(slice(size) for size in value.shape)] = value.detach()
    return whole


def _check_unmerged(part: nn.Module, name: str) -> None:
    overlay = overlay_needed(part)
    overlay.check_names([name])
    if name in overlay.route.in_weights:
        raise MergeError(f"Adapter {name!r} is merged: call unmerge_adapter() before swapping it.")


def _swap(
    part: nn.Module, name: str, config: LoraConfig, resolution: Resolution, tensors: Mapping[str, Tensor]
) -> None:
    """Write checked values over adapter `name`. Raises AttachError if they do not go with what is there."""
    instead = "Values of the same settings go into it with load_adapter(folder, name)."
    check_whole(part, f"Adapter {name!r} cannot be swapped", instead)
    overlay, find = overlay_needed(part), finder(part)
    there = {_place(site): site for site in (*overlay.resolutions[name].sites, *overlay.idle.get(name, ()))}
    adapters = {place: adapter_on(find(site.path), name, site.parameter) for place, site in there.items()}
    if any(has_master(parameter) for adapter in adapters.values() for parameter in adapter.parameters()):
        raise AttachError(
            f"Adapter {name!r} cannot be swapped: DeepSpeed has taken over the model and steps copies of its own, in "
            f"which the next step would find what was there before. {instead}"
        )
    problems = [
        *_other_places(overlay, name, config, resolution, there),
        *(why for site in resolution.sites if _place(site) in there for why in _other_form(adapters, there, site)),
    ]
    if problems:
        headline = f"Adapter {name!r} cannot be swapped in place; load the new one under a name of its own:"
        raise AttachError(bullet_list(headline, shortened(problems)))
    check_range(f"Adapter {name!r}", tensors, _dtypes(part, name, adapters, resolution))
    written = {_place(site): _values(adapters[_place(site)], site, tensors) for site in resolution.sites}
    idle = tuple(site for place, site in there.items() if place not in written)
    written |= {_place(site): _silent(part, site, adapters[_place(site)]) for site in idle}
    with torch.no_grad():
        for place, values in written.items():
            _write(adapters[place], values)
    for adapter in adapters.values():
        adapter.freeze()  # which of its factors train may differ; `follow_route` lets them
    frozen = FROZEN.get(str(config.init_lora_weights), ())
    for site in resolution.sites:
        adapters[_place(site)].become(scale=site.scale, dropout=site.dropout, frozen=frozen)
    overlay.idle[name] = idle
    overlay.resolutions[name] = resolution
    overlay.configs[name] = config.changed(inference_mode=not overlay.trainable[name]).in_use(
        target_modules=resolution.target_modules,
        modules_to_save=resolution.modules_to_save,
        fan_in_fan_out=any(site.kind.fan_in_fan_out for site in resolution.sites),
    )
    copy_besides_factors(part, name, tensors)
    follow_route(part, overlay)


def _dtypes(
    part: nn.Module, name: str, adapters: Mapping[tuple[str, str], Adapter], new: Resolution
) -> dict[str, torch.dtype]:
    """The dtypes that new values get, by their names in an adapter file."""
    dtypes = {key: value.dtype for key, value in besides_factors(part, name).items()}
    for site in new.sites:
        adapter = adapters[_place(site)]
        dtypes |= {key: getattr(adapter, own).dtype for own, key in site_keys(site).items()}
    return dtypes


def _place(site: Site) -> tuple[str, str]:
    return site.path, site.parameter


def _other_places(
    overlay: Overlay, name: str, config: LoraConfig, new: Resolution, there: Mapping[tuple[str, str], Site]
) -> list[str]:
    """Where the new adapter has what the one on the model has not, or the other way round."""
    old, before = overlay.resolutions[name], overlay.configs[name]
    extra = [site.path for site in new.sites if _place(site) not in there]
    problems = [f"{path} has no adapter {name!r} on the model" for path in extra]
    for what, mine, theirs in (("modules_to_save", old.saved, new.saved), ("bias", old.biases, new.biases)):
        if set(mine) != set(theirs):
            problems.append(f"{what}: {', '.join(sorted(set(mine) ^ set(theirs))[:3])} trained by one of them only")
    for field in _ALIKE:
        if getattr(before, field) != getattr(config, field):
            problems.append(f"{field}: {getattr(before, field)!r} on the model, {getattr(config, field)!r} in the new")
    if name in overlay.bases:
        problems.append("the adapter on the model has replaced weights of the base")
    if any(site.tied_to is not None for site in (*old.sites, *new.sites)):
        problems.append("ensure_weight_tying: one adapter lies on the embedding and the output head together")
    if takes_off_its_start(config) or config.init_lora_weights == "loftq":
        problems.append(
            f"init_lora_weights={config.init_lora_weights!r}: the new adapter goes with a changed base; load it once "
            "and save it as a plain LoRA"
        )
    return problems


def _other_form(
    adapters: Mapping[tuple[str, str], Adapter], there: Mapping[tuple[str, str], Site], new: Site
) -> list[str]:
    """Where the values of a site would not fit the adapter that is there."""
    adapter, old, problems = adapters[_place(new)], there[_place(new)], []
    for word, mine, theirs in (("use_dora", old.dora, new.dora), ("lora_bias", old.bias, new.bias)):
        if mine != theirs:
            problems.append(f"{new.path}: {word} is {mine} on the model, {theirs} in the new adapter")
    if adapter.start_A is not None:
        problems.append(f"{new.path}: the start of the adapter on the model was taken off the base")
    if not _is_prepared(adapter):
        return problems
    room = (adapter.lora_A.shape[0], adapter.lora_B.shape[1])
    if new.factors[0][0] > room[0] or new.factors[1][1] > room[1]:
        problems.append(
            f"{new.path}: rank {new.rank}, and the model is prepared for {room[0]}: call "
            f"prepare_model_for_compiled_hotswap(model, target_rank={new.rank}) before compiling"
        )
    elif _in_blocks(new) and new.rank != old.rank:
        problems.append(
            f"{new.path}: rank {new.rank}, and {old.rank} on the model: the factors of {new.kind.name} are in blocks, "
            "and padding those is not available"
        )
    return problems


def _values(adapter: Adapter, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new values of an adapter by its parameters' names, filled up with zeros where it was prepared."""
    values = {}
    for part, key in site_keys(site).items():
        own: Tensor = getattr(adapter, part)
        value = tensors[key].to(own.device, own.dtype)
        value = value.flatten() if part == "lora_magnitude_vector" else value
        fill = _is_prepared(adapter) and value.shape != own.shape
        values[part] = _fill(value, own.shape) if fill else value
    return values


def _silent(part: nn.Module, site: Site, adapter: Adapter) -> dict[str, Tensor]:
    """Values with which an adapter changes nothing."""
    values = {name: torch.zeros_like(own) for name, own in adapter.named_parameters()}
    if site.dora:
        W = read(part.get_submodule(site.path), site.parameter).detach().to(adapter.lora_A.dtype)
        values["lora_magnitude_vector"] = site.kind.row_norms(W)
    return values


def _write(adapter: Adapter, values: Mapping[str, Tensor]) -> None:
    """Give parameters these values, without gradients; one of another shape keeps its identity and loses its own."""
    for name, value in values.items():
        own: nn.Parameter = getattr(adapter, name)
        if own.shape == value.shape:
            own.copy_(value)
        else:
            own.data = value.clone()
            own.grad = None

"""An adapter on a model, seen as the tensors of an adapter file: names, shapes and values."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import AdapterFileError, bullet_list, check_kind
from veneer.layers import attach, saved_module
from veneer.layers import token_rows as row_module
from veneer.layers.kinds.tied import TIED_HEAD
from veneer.layers.saved_module import original_state
from veneer.layers.sharded import has_master, is_sharded, put, put_into_master, reshard, shape_of, whole
from veneer.layers.weights.offloaded import settle
from veneer.model.overlay import adapters_by_site, overlay_needed, saved_modules, token_rows
from veneer.model.start import START
from veneer.model.waiting import stop_waiting
from veneer.storage import keys
from veneer.storage.adapter_file import Expected
from veneer.targets import Resolution, Site
from veneer.targets.structure import embeddings


def site_keys(site: Site) -> dict[str, str]:
    """The names in an adapter file of what the adapter on a site has, by the names of its parameters."""
    name_A, name_B = site.kind.on_disk
    path = site.file_path or site.path
    names = {"lora_A": keys.factor(path, name_A), "lora_B": keys.factor(path, name_B)}
    if site.bias:
        names["lora_bias"] = keys.factor_bias(path)
    if site.dora:
        names["lora_magnitude_vector"] = keys.magnitude(path)
    return names


def site_shapes(site: Site) -> dict[str, tuple[int, ...]]:
    """The shapes in an adapter file of the same."""
    shape_A, shape_B = site.factors
    if site.kind is TIED_HEAD:
        shape_A, shape_B = shape_A[::-1], shape_B[::-1]
    return {"lora_A": shape_A, "lora_B": shape_B, "lora_bias": site.shape[:1], "lora_magnitude_vector": site.magnitude}


def without_padding(value: Tensor, part: str, site: Site) -> Tensor:
    """A view of what of A or B belongs to the adapter's own rank: `prepare_model_for_compiled_hotswap` adds zeros."""
    shape = site_shapes(site)[part]
    if part == "lora_A" and value.dim() == len(shape) and value.shape[0] > shape[0]:
        return value[: shape[0]]
    if part == "lora_B" and value.dim() == len(shape) and value.shape[1] > shape[1]:
        return value[:, : shape[1]]
    return value


def stack_sizes(resolution: Resolution) -> dict[str, int]:
    """How many matrices have their A in one tensor of a file, by its name; left out where it is one."""
    return {site_keys(site)["lora_A"]: site.kind.matrices for site in resolution.sites if site.kind.matrices > 1}


def bias_key(resolution: Resolution, name: str) -> str:
    """The name of a trained bias, given its parameter's name in the model."""
    path = name.rpartition(".")[0]
    return keys.bias(path, adapted=any(site.path == path for site in resolution.sites))


def expected_tensors(model: nn.Module, resolution: Resolution) -> dict[str, Expected]:
    """Every tensor that a file of this adapter must hold."""
    expected: dict[str, Expected] = {}
    for site in resolution.sites:
        shapes = site_shapes(site)
        expected |= {key: Expected(shapes[part]) for part, key in site_keys(site).items()}
    for path in resolution.saved:
        for name, value in original_state(model.get_submodule(path)).items():
            expected[keys.saved(path, name)] = Expected(tuple(shape_of(value)), value.is_floating_point())
    for site in resolution.token_rows:
        expected[keys.token_rows(site.path)] = Expected((len(site.tokens), site.width))
    for name in resolution.biases:
        expected[bias_key(resolution, name)] = Expected(tuple(shape_of(model.get_parameter(name))))
    return expected


def repeated_keys(model: nn.Module, resolution: Resolution, given: Iterable[str] = ()) -> dict[str, str | None]:
    """Names under which PEFT repeats what the file or the base holds, each with the base parameter it must equal.

    given  the names in the file, among which are some with the name that the adapter had in PEFT

    Those with None repeat another tensor of the file.
    """
    repeated: dict[str, str | None] = {}
    for path in embeddings(model):
        for name in _base_names(model.get_submodule(path)):
            inner, _, last = f"{path}.{name}".rpartition(".")
            repeated[keys.saved(path, name)] = repeated[keys.base_parameter(inner, last)] = f"{path}.{name}"
    for site in resolution.sites:
        if not site.by_weight:
            repeated[keys.base_weight(site.path)] = f"{site.path}.weight"
    for path in resolution.saved:
        for name in original_state(model.get_submodule(path)):
            copied, original = keys.inside_saved(path, name)
            repeated[copied] = None
            repeated[original] = f"{path}.{name}"
            repeated |= dict.fromkeys(key for key in given if keys.is_inside_saved(key, path, name))
    for path in (path for site in resolution.token_rows for path in site.paths):
        repeated[keys.below_token_rows(path)] = f"{path}.weight"
        repeated[keys.token_rows(path)] = None
    return repeated


def _base_names(module: nn.Module) -> list[str]:
    """The names of what a module holds by itself, without the adapters in it."""
    ours = {attach.CHILD, saved_module.CHILD, row_module.CHILD}
    return [name for name in module.state_dict() if not ours & set(name.split("."))]


def replaced_rows(resolution: Resolution) -> dict[str, tuple[int, ...]]:
    """The rows of base weights that the adapter has its own of, by parameter name."""
    return {f"{path}.weight": site.tokens for site in resolution.token_rows for path in site.paths}


def check_range(source: object, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise AdapterFileError naming the values that would become infinite in the dtype that they are to have."""
    too_large = [
        f"{key} ({tensors[key].dtype} into {dtype})"
        for key, dtype in dtypes.items()
        if key in tensors and _narrower(dtype, tensors[key].dtype) and tensors[key].to(dtype).isinf().any()
    ]
    if too_large:
        raise AdapterFileError(
            bullet_list(f"{source}: values too large for the model they go into, load it in float32:", too_large[:6])
        )


def _narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    floating = dtype.is_floating_point and than.is_floating_point
    return floating and torch.finfo(dtype).max < torch.finfo(than).max


def tied_keys(resolution: Resolution) -> list[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """(name, source's name, how the one is seen in the other) of tensors that a file holds for each tied module."""
    found: list[tuple[str, str, Callable[[Tensor], Tensor]]] = []
    by_path = {site.path: site for site in resolution.sites}
    for path, source in resolution.tied.items():
        if path in resolution.saved:
            found.append((keys.saved(path, "weight"), keys.saved(source, "weight"), _as_it_is))
        if path in by_path:
            seen = _transposed if by_path[path].kind is TIED_HEAD else _as_it_is
            theirs = site_keys(by_path[source])
            found += [(key, theirs[part], seen) for part, key in site_keys(by_path[path]).items()]
    return found


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _transposed(value: Tensor) -> Tensor:
    return value.T


def _on_disk(site: Site, part: str, value: Tensor) -> Tensor:
    """A parameter of the adapter on a site, without padding, in the shape that a file has it in."""
    value = without_padding(value.T if site.kind is TIED_HEAD else value, part, site)
    shape = site_shapes(site)[part]
    return value if value.shape == shape else value.view(shape)


class Place(NamedTuple):
    """Where a value of an adapter file is in the model, and how a file has what is there: as another view."""

    tensor: Tensor
    seen: Callable[[Tensor], Tensor]


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The values of adapter `name` by their names in an adapter file: the tensors themselves, not copies.

    Those of a sharded model are gathered, in which all of its ranks must take part.
    """
    return {key: place.seen(whole(place.tensor)) for key, place in _places(model, name).items()}


def adapter_dtypes(model: nn.Module, name: str) -> dict[str, torch.dtype]:
    """The dtypes of the same, without a look at the values."""
    return {key: place.tensor.dtype for key, place in _places(model, name).items()}


def _places(model: nn.Module, name: str) -> dict[str, Place]:
    reshard(model)
    places: dict[str, Place] = {}
    for site, adapter in adapters_by_site(model, name):
        for part, key in site_keys(site).items():
            places[key] = Place(getattr(adapter, part), partial(_on_disk, site, part))
        if adapter.start_A is not None and adapter.start_B is not None:
            keys_of = site_keys(site)
            places[keys_of["lora_A"] + START] = Place(adapter.start_A, _as_it_is)
            places[keys_of["lora_B"] + START] = Place(adapter.start_B, _as_it_is)
    return places | {key: Place(value, _as_it_is) for key, value in besides_factors(model, name).items()}


def besides_factors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Those of them that are no adapter's on a layer: modules trained in full, rows of embeddings, biases.

    They are the parameters themselves; those of a sharded model are the shards.
    """
    overlay, tensors = overlay_needed(model), {}
    for path, module in saved_modules(model, name):
        settle(module.modules_to_save[name])
        for inner, value in module.modules_to_save[name].state_dict(keep_vars=True).items():
            tensors[keys.saved(path, inner)] = value
    for site, rows in token_rows(model, name):
        tensors[keys.token_rows(site.path)] = rows.trainable_tokens_delta
    if name in overlay.biases:
        for parameter_name, value in overlay.biases[name].values(model).items():
            tensors[bias_key(overlay.resolutions[name], parameter_name)] = value
    return tensors


def tensors_from_state(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of adapter `name` out of a state dict of the model, by their names in an adapter file.

    The names may begin with `base_model.model.`, as those of a PeftModel do.
    """
    overlay = overlay_needed(model)
    resolution = overlay.resolutions[name]
    check_kind(state, Mapping, "A state dict of the model ({name: tensor})")
    plain = {key.removeprefix(keys.PREFIX): value for key, value in state.items()}
    names: dict[str, str] = {}
    for site in resolution.sites:
        adapter = f"{site.path}.{attach.CHILD}.{name}" + (f".{site.parameter}" if site.by_weight else "")
        names |= {key: f"{adapter}.{part}" for part, key in site_keys(site).items()}
        for part, start in (("lora_A", "start_A"), ("lora_B", "start_B")):
            names[site_keys(site)[part] + START] = f"{adapter}.{start}"
    for path in resolution.saved:
        for inner in original_state(model.get_submodule(path)):
            names[keys.saved(path, inner)] = f"{path}.{saved_module.CHILD}.{name}.{inner}"
    for site in resolution.token_rows:
        names[keys.token_rows(site.path)] = f"{site.path}.{row_module.CHILD}.{name}.trainable_tokens_delta"
    names |= {bias_key(resolution, bias): bias for bias in resolution.biases}
    shapes = {key: site_shapes(site)[part] for site in resolution.sites for part, key in site_keys(site).items()}
    found = {key: plain[in_model] for key, in_model in names.items() if in_model in plain}
    for key, source, seen in tied_keys(resolution):
        if source in found:
            found[key] = seen(found[source])
    for site in resolution.sites:
        found |= {k: without_padding(found[k], part, site) for part, k in site_keys(site).items() if k in found}
    return {
        key: value.reshape(shapes[key]) if key in shapes and value.numel() == math.prod(shapes[key]) else value
        for key, value in found.items()
    }


def copy_besides_factors(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy those checked values into a new adapter whose layers were made with theirs."""
    with torch.no_grad():
        for key, value in besides_factors(model, name).items():
            put(value, tensors[key])
    stop_waiting(model, overlay_needed(model), name)


def copy_tensors(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked values, by their names in an adapter file, into an adapter that is on the model.

    Where they do not say what an adapter took off the base at its start, it keeps what it has. All ranks of a sharded
    model must take part, with the same values.
    """
    with torch.no_grad():
        for key, place in _places(model, name).items():
            if key in tensors or not key.endswith(START):
                now = whole(place.tensor)
                was = now.clone() if has_master(place.tensor) else None
                place.seen(now).copy_(tensors[key])
                if is_sharded(place.tensor):
                    put(place.tensor, now)
                if was is not None and not torch.equal(was, now):
                    put_into_master(place.tensor, now)
    stop_waiting(model, overlay_needed(model), name)

"""Adapters and base as dictionaries of tensors, under PEFT's function names and with the keys of its files."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import AdapterFileError, ConfigError, MergeError, VeneerWarning, bullet_list, check_kind, shortened
from veneer.layers.attach import Adapted, Adapters
from veneer.layers.saved_module import Copies
from veneer.layers.token_rows import RowsByAdapter
from veneer.model.apply import one_at_a_time
from veneer.model.belongs import check_repeats_base
from veneer.model.merge import base_in_place
from veneer.model.methods import AdapterMethods
from veneer.model.overlay import DEFAULT, adapted_part, overlay_needed, overlay_of
from veneer.model.renamed.state import with_todays_names
from veneer.model.sharded import on_all_ranks
from veneer.model.start import START
from veneer.model.tensors import (
    adapter_dtypes,
    adapter_tensors,
    check_range,
    copy_tensors,
    expected_tensors,
    repeated_keys,
    tensors_from_state,
    tied_keys,
)
from veneer.storage import keys
from veneer.storage.adapter_file import check_integrity, read_tensors, read_weights_header
from veneer.storage.hub import adapter_folder
from veneer.targets import Resolution
from veneer.targets.structure import embeddings

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class LoadResult(NamedTuple):
    """What a state dict did not say, and what it said in vain, by its keys."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = DEFAULT,
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The values of one adapter by their names in an adapter file: the tensors themselves, detached, not copies.

    state_dict             a state dict of the model to take the values from, as gathered from shards
    save_embedding_layers  True adds the base weights of the embedding and the output head; "auto" is False, as the
                           base has them
    unwrap_compiled        is there for PEFT's callers; a compiled model is always looked into

    Of an adapter that takes its start off the base (PiSSA, say) these are A and B alone, as in PEFT;
    `save_pretrained` writes what is whole without that start. Those of a sharded model are gathered: all of its ranks
    must call it, and each gets them.

    The keys of a PeftModel begin with `base_model.model.`, as in files; those of a model adapted in place do not.
    Raises AdapterNameError, or AdapterFileError if `state_dict` lacks some.
    """
    part = adapted_part(model)
    overlay = overlay_needed(part)
    overlay.check_names([adapter_name])
    resolution = overlay.resolutions[adapter_name]
    if save_embedding_layers not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers={save_embedding_layers!r}: must be True, False or 'auto'.")
    if state_dict is None:
        tensors = adapter_tensors(part, adapter_name)
    else:
        tensors = tensors_from_state(part, adapter_name, state_dict)
    tensors = {key: value for key, value in tensors.items() if not key.endswith(START)}
    if lacking := [key for key in expected_tensors(part, resolution) if key not in tensors]:
        raise AdapterFileError(
            bullet_list(f"The state dict lacks values of adapter {adapter_name!r}:", shortened(lacking))
        )
    if save_embedding_layers is True:
        for path in embeddings(part):
            layer: Any = part.get_submodule(path)
            adapted = isinstance(part.get_submodule(path), Adapted)
            key = keys.base_weight(path) if adapted else keys.saved(path, "weight")
            tensors.setdefault(key, layer.weight.detach())
    if _inside_facade(model):
        return tensors
    return {key.removeprefix(keys.PREFIX): value for key, value in tensors.items()}


@one_at_a_time
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = DEFAULT,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool = True,
) -> LoadResult:
    """Copy values into an adapter that is on the model, by their names in an adapter file.

    Keys may lack `base_model.model.`, and values may have any floating-point dtype. Returns the keys that were
    missing and unexpected: none, unless an option allows them.

    ignore_mismatched_sizes  leave out tensors of another shape, with a warning
    strict                   False: leave missing values as they are and unexpected ones alone
    low_cpu_mem_usage        is there for PEFT's callers; nothing is ever allocated twice

    All ranks of a sharded model must call it, with the same values.
    Raises AdapterNameError, MergeError while the adapter is merged, or AdapterFileError that lists every difference
    and every tensor with NaN or infinity; and then nothing has changed.
    """
    part = adapted_part(model)
    overlay = overlay_needed(part)
    overlay.check_names([adapter_name])
    if adapter_name in overlay.route.in_weights:
        raise MergeError(f"Adapter {adapter_name!r} is merged: call unmerge_adapter() before giving it other values.")
    with on_all_ranks(part, f"giving adapter {adapter_name!r} its values"):
        given = with_prefix(peft_model_state_dict)
        given = with_todays_names(part, overlay.configs[adapter_name], overlay.resolutions[adapter_name], given)
        fits = _Fit(part, overlay.resolutions[adapter_name], given)
        fits.check(f"adapter {adapter_name!r}", strict=strict, ignore_sizes=ignore_mismatched_sizes)
        check_repeats_base(part, "The state dict", given, fits.repeated)
        check_range("The state dict", fits.usable, adapter_dtypes(part, adapter_name))
    copy_tensors(part, adapter_name, {**adapter_tensors(part, adapter_name), **fits.usable})
    left = [*fits.missing, *fits.mismatched]
    return LoadResult([key for key in fits.expected if key in left], fits.unexpected)


def checked_values(model: nn.Module, resolution: Resolution, state: Mapping[str, Tensor], what: str) -> dict:
    """The values in a state dict of just this adapter, by their names in an adapter file.

    Raises AdapterFileError that lists every difference.
    """
    given = with_prefix(state)
    fits = _Fit(model, resolution, given)
    fits.check(what)
    check_repeats_base(model, "The state dict", given, fits.repeated)
    return fits.usable


def with_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the keys that files have, whether its own begin with `base_model.model.` or not."""
    check_state(state)
    plain = {key.removeprefix("_orig_mod."): value for key, value in state.items()}
    return {key if key.startswith(keys.PREFIX) else keys.PREFIX + key: value for key, value in plain.items()}


def check_state(state: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError unless this maps names to tensors."""
    check_kind(state, Mapping, "A state dict ({name: tensor})")
    for name, value in state.items():
        check_kind(name, str, "A name for each tensor of a state dict")
        check_kind(value, Tensor, f"A tensor for {name!r} in a state dict")


class _Fit:
    """A state dict beside what an adapter needs."""

    def __init__(self, model: nn.Module, resolution: Resolution, given: Mapping[str, Tensor]) -> None:
        self.given = given
        self.expected = expected_tensors(model, resolution)
        repeated = repeated_keys(model, resolution, given)
        self.repeated = {key: base for key, base in repeated.items() if key not in self.expected}
        self.missing = [key for key in self.expected if key not in given]
        self.unexpected = [key for key in given if key not in self.expected and key not in self.repeated]
        there = [key for key in self.expected if key in given]
        self.mismatched = [key for key in there if tuple(given[key].shape) != self.expected[key].shape]
        self.usable = {key: given[key] for key in there if key not in self.mismatched}
        self.apart = [
            f"tied to {source}, and differs from it: {key}"
            for key, source, seen in tied_keys(resolution)
            if {key, source} <= self.usable.keys() and not torch.equal(given[key], seen(given[source]))
        ]

    def check(self, what: str, *, strict: bool = True, ignore_sizes: bool = False) -> None:
        """Raise AdapterFileError listing every difference that is not allowed, and every value that is broken."""
        sizes = [
            f"wrong shape  {key} {list(self.given[key].shape)}, the model needs {list(self.expected[key].shape)}"
            for key in self.mismatched
        ]
        floating = [key for key in self.usable if self.expected[key].floating]
        no_floats = [key for key in floating if self.usable[key].dtype not in _FLOATS]
        broken = [key for key in floating if key not in no_floats and not self.usable[key].isfinite().all()]
        problems = [
            *(shortened([f"missing      {key}" for key in self.missing]) if strict else []),
            *(shortened([f"not expected {key}" for key in self.unexpected]) if strict else []),
            *(shortened(sizes) if not ignore_sizes else []),
            *shortened([f"wrong dtype  {key} is {self.usable[key].dtype}" for key in no_floats]),
            *shortened([f"NaN or infinity in {key}" for key in broken]),
            *shortened(self.apart),
        ]
        if problems:
            raise AdapterFileError(bullet_list(f"The state dict does not fit {what}:", problems))
        if sizes:
            headline = "ignore_mismatched_sizes=True: these keep the values they have:"
            warnings.warn(bullet_list(headline, shortened(sizes)), VeneerWarning, stacklevel=4)


def load_peft_weights(
    model_id: str | Path,
    device: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    *,
    subfolder: str | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter file, by their names there; only safetensors is read.

    model_id     an adapter folder, or a hub id with `revision=`, `token=`, `cache_dir=`, … as on the hub
    device       where to put them; None for the CPU
    key_mapping  {regular expression: replacement} for names without `base_model.model.`; the first that matches counts

    Raises AdapterFileError if there is no such file, or it is damaged or holds NaN or infinity.
    """
    folder = adapter_folder(model_id, subfolder=subfolder, **hub)
    header = read_weights_header(folder)
    tensors = read_tensors(folder, header.tensors, header)
    check_integrity(folder, header, tensors)
    renamed = {_renamed(key, key_mapping or {}): key for key in tensors}
    if len(renamed) < len(tensors):
        raise AdapterFileError(f"{folder}: key_mapping gives two tensors one name.")
    return {new: tensors[key] if device is None else tensors[key].to(device) for new, key in renamed.items()}


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    plain = key.removeprefix(keys.PREFIX)
    for pattern, replacement in mapping.items():
        new, times = re.subn(pattern, replacement, plain)
        if times:
            return key.replace(plain, new)
    return key


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base model, as if no adapter lay over it: its own keys and values, not copies.

    Raises AdapterNameError if the model has no adapter.
    """
    part = adapted_part(model)
    with base_in_place(part):
        return _base_state(part)


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Copy values into the base under the adapters, by the base model's own keys.

    strict  False: allow missing and unexpected keys, which are returned

    Raises AdapterNameError, or AdapterFileError that lists every difference; and then nothing has changed.
    """
    part = adapted_part(model)
    check_state(state_dict)
    with base_in_place(part):
        own = _base_state(part)
        missing = [key for key in own if key not in state_dict]
        unexpected = [key for key in state_dict if key not in own]
        sizes = [
            f"wrong shape  {key} {list(state_dict[key].shape)}, the model needs {list(value.shape)}"
            for key, value in own.items()
            if key in state_dict and state_dict[key].shape != value.shape
        ]
        problems = [f"missing      {key}" for key in missing] + [f"not expected {key}" for key in unexpected]
        problems = [*(shortened(problems) if strict else []), *shortened(sizes)]
        if problems:
            raise AdapterFileError(bullet_list("The state dict does not fit the base model:", problems))
        part.load_state_dict({key: value for key, value in state_dict.items() if key in own}, strict=False)
    return LoadResult(missing, unexpected)


def _base_state(part: nn.Module) -> dict[str, Tensor]:
    ours = tuple(
        f"{path}." for path, module in part.named_modules() if isinstance(module, Adapters | Copies | RowsByAdapter)
    )
    return {key: value for key, value in part.state_dict().items() if not key.startswith(ours)}


def _inside_facade(model: nn.Module) -> bool:
    """Whether a PeftModel is on the way from `model` to the part that has the adapters."""
    for module in model.modules():
        if isinstance(module, AdapterMethods) or overlay_of(module) is not None:
            return isinstance(module, AdapterMethods)
    return False

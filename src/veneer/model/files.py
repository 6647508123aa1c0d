"""Between a model and an adapter folder: save one, load one; everything is checked before anything changes."""

import os
import warnings
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from veneer._version import __version__
from veneer.config import LoraConfig, config_in
from veneer.errors import AdapterFileError, ConfigError, VeneerWarning, bullet_list, check_kind, shortened
from veneer.layers.replication import replicated
from veneer.layers.saved_module import original_state
from veneer.layers.swap import base_class
from veneer.model.apply import carry_out, one_at_a_time
from veneer.model.belongs import check_config_belongs, check_rank, check_repeats_base, check_tied, note_of
from veneer.model.card import base_of, write_card
from veneer.model.make import saved_dtypes
from veneer.model.overlay import DEFAULT, adapters_by_site, overlay_needed
from veneer.model.plan import plan
from veneer.model.ranks import all_ranks, is_first
from veneer.model.renamed.file import RenamedFile, read_renamed
from veneer.model.sharded import ranks_of_model
from veneer.model.start import (
    START,
    check_start_can_be_redone,
    doubled,
    joined,
    joined_shapes,
    split,
    takes_off_its_start,
)
from veneer.model.tensors import (
    adapter_tensors,
    check_range,
    expected_tensors,
    repeated_keys,
    replaced_rows,
    site_keys,
    stack_sizes,
    tensors_from_state,
)
from veneer.storage import keys
from veneer.storage.adapter_file import (
    WEIGHTS_FILE,
    Expected,
    check_header,
    check_integrity,
    read_tensors,
    read_weights_header,
    write_adapter,
)
from veneer.storage.header import Header
from veneer.targets import Resolution, resolve
from veneer.targets.saved import read_by_ending
from veneer.targets.structure import Structure, structure_of

NO_NOTES: Mapping[str, Any] = MappingProxyType({})


def save_adapter(
    model: nn.Module,
    name: str,
    folder: Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    plain: bool = True,
    card: Mapping[str, Any] | None = NO_NOTES,
) -> None:
    """Write adapter `name` to a folder in PEFT's format, in one step.

    state  a state dict of the model to take the values from, as gathered from shards
    plain  write an adapter that takes its start off the base as a LoRA of twice the rank over the original base;
           False: as it is in memory, to be read over the same base by the same initialisation
    card   what the model card says besides (`write_card`); None: write no card

    All ranks of a sharded model must call it: they gather the values, and the first one writes.

    Raises AdapterNameError, ConfigError if the config was edited, AdapterFileError if values are broken or missing,
    RankError if another rank failed or does not call it.
    """
    overlay = overlay_needed(model)
    overlay.check_names([name])
    ranks = None if state is not None else ranks_of_model(model)
    if ranks is None:
        tensors = adapter_tensors(model, name) if state is None else tensors_from_state(model, name, state)
        _save_tensors(model, name, folder, tensors, plain=plain, card=card)
        return
    with all_ranks(f"saving adapter {name!r}", ranks):
        pass  # all are here, before a collective would wait for one that is not
    tensors = adapter_tensors(model, name)
    with all_ranks(f"writing adapter {name!r} to {folder}", ranks):
        if is_first(ranks):
            _save_tensors(model, name, folder, tensors, plain=plain, card=card)


def _save_tensors(
    model: nn.Module,
    name: str,
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    plain: bool,
    card: Mapping[str, Any] | None,
) -> None:
    overlay = overlay_needed(model)
    expected = expected_tensors(model, overlay.resolutions[name])
    _refuse_incomplete(folder, tensors, expected)
    config = overlay.configs[name]
    config.check_unedited()
    if any(adapter.is_rescaled() for _, adapter in adapters_by_site(model, name)):
        warnings.warn(
            f"Adapter {name!r} is rescaled just now, and that is not saved: the file describes the scale it was "
            f"trained with. Call set_scale({name!r}, factor) again after loading.",
            VeneerWarning,
            stacklevel=3,
        )
    kept = {key: value for key, value in tensors.items() if key.removesuffix(START) in expected}
    if takes_off_its_start(config) and plain:
        config, kept = doubled(config), joined(kept, stack_sizes(overlay.resolutions[name]))
    elif takes_off_its_start(config):
        check_start_can_be_redone(config, f"Not saved to {folder}")
        kept = {key: kept[key] for key in expected}
    if card is not None:
        card = {"base": base_of(model), **card}
    write_values(folder, config, kept, card=card)


def _refuse_incomplete(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Expected]) -> None:
    wrong = [
        f"{key}: {list(tensors[key].shape) if key in tensors else 'missing'}, expected {list(needed.shape)}"
        for key, needed in expected.items()
        if key not in tensors or tuple(tensors[key].shape) != needed.shape
    ]
    if wrong:
        headline = f"Not saved to {folder}: these values are incomplete (sharded and not gathered?):"
        raise AdapterFileError(bullet_list(headline, shortened(wrong)))


def save_adapters(
    model: nn.Module,
    names: Sequence[str],
    folder: Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    plain: bool = True,
    card: Mapping[str, Any] = NO_NOTES,
) -> None:
    """Save adapters: `default` to the folder itself, each other one to a subfolder of its name, with one model card."""
    places = {name: "" if name == DEFAULT else name for name in names}
    card = {**card, "adapters": sorted(places.values())}
    for name, place in places.items():
        save_adapter(model, name, folder / place, state=state, plain=plain, card=None if place else card)
    ranks = ranks_of_model(model)
    if DEFAULT not in places and (ranks is None or is_first(ranks)):
        write_card(folder, base=base_of(model), **card)


def write_values(
    folder: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    *,
    card: Mapping[str, Any] | None = NO_NOTES,
) -> None:
    """Write an adapter given by its values, complete, by their names in the file, with its model card.

    card  what the card says besides (`write_card`); None: write no card. Raises AdapterFileError.
    """
    check_kind(folder, (str, os.PathLike), "The folder to save to")
    notes = {"veneer_version": __version__, **note_of(config)}
    target = Path(folder)

    def beside(stage: Path, header: Header) -> None:
        alone = (card or {}).get("adapters", ("",))[0] == ""
        write_card(stage, before=target, header=header if alone else None, **(card or {}))

    write_adapter(
        target,
        config.changed(inference_mode=True).to_json(),
        tensors,
        metadata=notes,
        beside=None if card is None else beside,
    )


@one_at_a_time
def load_adapter(
    model: nn.Module,
    name: str,
    folder: Path,
    *,
    trainable: bool = False,
    config: LoraConfig | None = None,
    float32: bool = True,
) -> LoraConfig:
    """Attach the adapter in a folder under `name`; returns its config.

    config  used instead of the folder's own

    A name in the config that the model does not have is warned of, no more: the tensors say what must be there.

    Raises ConfigError, TargetError, AdapterNameError or AdapterFileError, and then nothing has changed.
    """
    if config is None:
        config = config_in(folder)
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"config must be a LoraConfig or None, not {type(config).__name__}.")
    config = config.changed(inference_mode=not trainable)
    if takes_off_its_start(config):
        check_start_can_be_redone(config, f"{folder} cannot be loaded")
    header = read_weights_header(folder)
    check_config_belongs(folder, config, header)
    check_rank(folder, config, header)
    structure = structure_of(model)
    renamed = _read_renamed(model, folder, config, header, structure)
    config = renamed.config if renamed else config
    config = _saved_as_in_peft(model, config, renamed.header if renamed else header)
    todo = plan(model, name, config, strict=False, structure=structure)
    with replicated(model, todo.config.layer_replication):
        tensors = _checked_tensors(model, folder, todo.resolution, header, renamed=renamed)
        check_range(folder, tensors, saved_dtypes(model, todo.resolution, tensors, float32=float32))
    carry_out(model, todo, tensors=tensors, float32=float32)
    return todo.config


def read_checked(model: nn.Module, name: str, folder: Path) -> dict[str, Tensor]:
    """The values in a folder that fit adapter `name` as it is on the model.

    Raises AdapterFileError if they do not, or were trained with other settings.
    """
    overlay = overlay_needed(model)
    header, config, resolution = read_weights_header(folder), overlay.configs[name], overlay.resolutions[name]
    if not takes_off_its_start(config):
        check_config_belongs(folder, config, header)
        return _checked_tensors(model, folder, resolution, header)
    check_config_belongs(folder, doubled(config), header)
    halves = {site_keys(site)[part] for site in resolution.sites for part in ("lora_A", "lora_B")}
    return split(_checked_tensors(model, folder, resolution, header, halves), halves, stack_sizes(resolution))


def read_other(
    model: nn.Module, name: str, folder: Path, config: LoraConfig
) -> tuple[LoraConfig, Resolution, dict[str, Tensor]]:
    """The adapter in a folder: its config and what that means for this model, and its values, fully checked.

    name  the adapter whose place it is to take: what the config means is known if it is that one's, and the file too

    Attaches nothing. Raises TargetError or AdapterFileError.
    """
    header = read_weights_header(folder)
    check_config_belongs(folder, config, header)
    check_rank(folder, config, header)
    overlay = overlay_needed(model)
    if config.means_as(overlay.configs[name]):
        known = overlay.resolutions[name]
        expected = expected_tensors(model, known)
        if header.tensors.keys() == expected.keys():
            return config, known, _checked_tensors(model, folder, known, header, expected=expected)
    structure = structure_of(model)
    renamed = _read_renamed(model, folder, config, header, structure)
    config = renamed.config if renamed else config
    config = _saved_as_in_peft(model, config, renamed.header if renamed else header)
    resolution = resolve(model, config, strict=False, structure=structure)
    return config, resolution, _checked_tensors(model, folder, resolution, header, renamed=renamed)


def _read_renamed(
    model: nn.Module, folder: Path, config: LoraConfig, header: Header, structure: Structure
) -> RenamedFile | None:
    """The file with today's names if it was made for an older version of the model, with a warning; else None."""
    renamed = read_renamed(model, folder, config, header, structure)
    if renamed is not None:
        warnings.warn(renamed.notice(folder, base_class(model).__name__), VeneerWarning, stacklevel=5)
    return renamed


def _checked_tensors(
    model: nn.Module,
    folder: Path,
    resolution: Resolution,
    header: Header,
    halves: Set[str] = frozenset(),
    *,
    renamed: RenamedFile | None = None,
    expected: Mapping[str, Expected] | None = None,
) -> dict[str, Tensor]:
    """The values of a file that fits; those in `halves` hold a factor and its start.

    renamed   the same file with today's names, if it has others
    expected  `expected_tensors` of the model, if they were made already
    """
    names = header if renamed is None else renamed.header
    expected = joined_shapes(expected_tensors(model, resolution) if expected is None else expected, halves)
    extra = [key for key in names.tensors if key not in expected]
    repeated = repeated_keys(model, resolution, names.tensors) if extra else {}
    repeated = {key: base for key, base in repeated.items() if key not in expected}
    check_header(folder, names, expected, repeated)
    tensors = read_tensors(folder, header.tensors, header)
    check_integrity(folder, header, tensors)
    tensors = tensors if renamed is None else renamed.values(tensors)
    check_repeats_base(model, str(Path(folder) / WEIGHTS_FILE), tensors, repeated, replaced_rows(resolution))
    check_tied(folder, tensors, resolution)
    return {key: tensors[key] for key in expected}


def _saved_as_in_peft(model: nn.Module, config: LoraConfig, header: Header) -> LoraConfig:
    """The config with each module named that PEFT took for one of `modules_to_save` and the file has values of."""
    if not config.modules_to_save:
        return config
    modules = read_by_ending((path for path, _ in model.named_modules()), config)
    whole = {path: original_state(model.get_submodule(path)) for path in modules}
    found = [p for p, state in whole.items() if state and all(keys.saved(p, name) in header.tensors for name in state)]
    return config.changed(modules_to_save=[*config.modules_to_save, *found]) if found else config

"""Give an adapter that is on a model the values it was saved with, as going on with a training run does."""

from pathlib import Path

from torch import nn

from veneer.config import config_in
from veneer.errors import AdapterFileError, AdapterNameError, MergeError, bullet_list
from veneer.model.apply import follow_route, one_at_a_time
from veneer.model.files import read_checked
from veneer.model.overlay import DEFAULT, overlay_needed
from veneer.model.sharded import on_all_ranks
from veneer.model.start import doubled, takes_off_its_start
from veneer.model.tensors import adapter_dtypes, check_range, copy_tensors
from veneer.storage.adapter_file import WEIGHTS_FILE

# What the shapes of the values do not tell.
_SETTINGS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "alora_invocation_tokens",
    "trainable_token_indices",
)


@one_at_a_time
def restore(model: nn.Module, name: str, folder: Path, *, trainable: bool = False) -> None:
    """Copy the values in a folder into adapter `name`; nothing else about it changes.

    trainable  let it train if it did not

    Raises AdapterNameError if its settings are others, AdapterFileError if the file is damaged or does not fit,
    MergeError while it is merged; and then nothing has changed.
    """
    with on_all_ranks(model, f"comparing adapter {name!r} with {folder}"):
        if differing := _differing(model, name, folder):
            headline = (
                f"The model has an adapter {name!r} already, of other settings. Choose another name, delete that one, "
                "or put the new one in its place with hotswap_adapter:"
            )
            raise AdapterNameError(bullet_list(headline, differing))
    _take_values(model, name, folder, trainable=trainable)


def _take_values(model: nn.Module, name: str, folder: Path, *, trainable: bool = False) -> None:
    overlay = overlay_needed(model)
    overlay.check_names([name])
    if name in overlay.route.merged:
        raise MergeError(f"Adapter {name!r} is merged: call unmerge_adapter() before giving it other values.")
    with on_all_ranks(model, f"reading {folder}"):
        tensors = read_checked(model, name, folder)
        check_range(folder, tensors, adapter_dtypes(model, name))
    copy_tensors(model, name, tensors)
    if trainable and not overlay.trainable[name]:
        overlay.trainable[name] = True
        follow_route(model, overlay)


def _differing(model: nn.Module, name: str, folder: Path) -> list[str]:
    """The settings that differ between adapter `name` and the one in a folder, a line each."""
    overlay = overlay_needed(model)
    overlay.check_names([name])
    config = overlay.configs[name]
    saved = config_in(folder)
    mine = doubled(config) if takes_off_its_start(config) and not takes_off_its_start(saved) else config
    return [
        f"{field}: {getattr(mine, field)!r} on the model, {getattr(saved, field)!r} in {folder}"
        for field in _SETTINGS
        if getattr(mine, field) != getattr(saved, field)
    ]


def restore_all(model: nn.Module, by_facade: bool, folder: Path) -> bool:
    """Copy what a checkpoint holds into the adapters of a model. False if it holds no adapter.

    by_facade  it was written by a PeftModel: every adapter in its place. Otherwise by a model in place: the active one

    Raises AdapterFileError if an adapter that trains is not there, its settings are others, its file is damaged or
    does not fit; MergeError while it is merged.
    """
    overlay = overlay_needed(model)
    places = (
        {name: place_of(folder, name) for name in overlay.configs}
        if by_facade
        else dict.fromkeys(overlay.route.active, folder)
    )
    there = {name: place for name, place in places.items() if (place / WEIGHTS_FILE).is_file()}
    if not there:
        return False
    if lacking := [name for name in overlay.route.active if overlay.trainable[name] and name not in there]:
        raise AdapterFileError(f"{folder} has no values for adapter {', '.join(map(repr, lacking))}.")
    if not by_facade and len(there) > 1:
        raise AdapterFileError(f"{folder} holds one adapter, and {len(there)} are active: call set_adapter with one.")
    if differing := [line for name, place in there.items() for line in _differing(model, name, place)]:
        headline = f"Training cannot go on from {folder}: make the model with the settings that were trained there."
        raise AdapterFileError(bullet_list(headline, differing))
    for name, place in there.items():
        _take_values(model, name, place)
    return True


def place_of(folder: Path, name: str) -> Path:
    """Where in a folder a PeftModel writes an adapter: `default` to the folder itself, others below it."""
    return folder if name == DEFAULT else folder / name

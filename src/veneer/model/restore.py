"""Give an adapter that is on a model the values it was saved with, as going on with a training run does."""

from pathlib import Path

from torch import nn

from veneer.config import LoraConfig
from veneer.errors import AdapterNameError, MergeError, bullet_list
from veneer.model.apply import follow_route, one_at_a_time
from veneer.model.files import read_checked
from veneer.model.overlay import overlay_needed
from veneer.model.start import doubled, takes_off_its_start
from veneer.model.tensors import adapter_tensors, check_range, copy_tensors
from veneer.storage.adapter_file import CONFIG_FILE, read_config

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
    overlay = overlay_needed(model)
    overlay.check_names([name])
    if name in overlay.route.merged:
        raise MergeError(f"Adapter {name!r} is merged: call unmerge_adapter() before giving it other values.")
    _check_settings(overlay.configs[name], name, folder)
    tensors = read_checked(model, name, folder)
    own = adapter_tensors(model, name)
    check_range(folder, tensors, {key: value.dtype for key, value in own.items()})
    copy_tensors(model, name, tensors)
    if trainable and not overlay.trainable[name]:
        overlay.trainable[name] = True
        follow_route(model, overlay)


def _check_settings(config: LoraConfig, name: str, folder: Path) -> None:
    saved = LoraConfig.from_dict(read_config(folder), source=str(folder / CONFIG_FILE))
    mine = doubled(config) if takes_off_its_start(config) and not takes_off_its_start(saved) else config
    differing = [
        f"{field}: {getattr(mine, field)!r} on the model, {getattr(saved, field)!r} in {folder}"
        for field in _SETTINGS
        if getattr(mine, field) != getattr(saved, field)
    ]
    if differing:
        headline = (
            f"The model has an adapter {name!r} already, of other settings. Choose another name, delete that one, or "
            "put the new one in its place with hotswap_adapter:"
        )
        raise AdapterNameError(bullet_list(headline, differing))

"""Merge into the original of a quantised model: it is loaded in full precision, and the adapters are laid over it."""

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from veneer.errors import MergeError, VeneerWarning
from veneer.layers.swap import base_class
from veneer.model.files import load_adapter, save_adapter
from veneer.model.merge import checked_names, merge_and_remove
from veneer.model.overlay import adapters_by_site, overlay_needed
from veneer.storage.checkpoint import cached_checkpoint

_WAYS = (
    "The base is quantised, and rounding it again would lose part of the adapter; {why}. Load the base unquantised (in "
    "bfloat16, say), load the adapter on it, and merge there; or pass requantize=True, and be told how much is lost."
)


def merged_original(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """The original of a quantised transformers model, in the dtype of its files, with adapters merged into it.

    names  the active adapters unless given

    The original is the folder that the model was loaded from, or the hub's cache; nothing is downloaded. The model
    itself stays as it is. Warns where it was found. Raises MergeError that names both ways on if it is not found.
    """
    names = checked_names(model, overlay_needed(model), names)
    folder = _folder(model, names)
    loaded: Any = base_class(model)
    try:
        original = loaded.from_pretrained(folder, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise MergeError(_WAYS.format(why=f"its original in {folder} cannot be loaded ({reason})")) from error
    for name in names:
        _lay_over(original, name, model)
    merge_and_remove(original, names)
    warnings.warn(
        f"The base is quantised, so the adapter was merged into its original, from {folder}, in "
        f"{str(original.dtype).removeprefix('torch.')}. Pass requantize=True for a merged model that is quantised.",
        VeneerWarning,
        stacklevel=4,
    )
    return original.eval()


def _lay_over(original: nn.Module, name: str, model: nn.Module) -> None:
    """Give the original the adapter that the model has, at the scale that it has there now."""
    with tempfile.TemporaryDirectory() as scratch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VeneerWarning)  # that a scale of now is not saved
            save_adapter(model, name, Path(scratch), card=None)
        load_adapter(original, name, Path(scratch))
    for (_, mine), (_, theirs) in zip(adapters_by_site(original, name), adapters_by_site(model, name), strict=True):
        mine.rescale(float(theirs.scale))


def _folder(model: Any, names: Sequence[str]) -> Path:
    """Where the original is. Raises MergeError if nobody knows, or what is there is quantised itself."""
    if not hasattr(base_class(model), "from_pretrained"):
        raise MergeError(_WAYS.format(why=f"a {base_class(model).__name__} does not say what it was loaded from"))
    config = overlay_needed(model).configs[names[0]]
    name = vars(model).get("name_or_path") or config.base_model_name_or_path
    if not name:
        raise MergeError(_WAYS.format(why="the model does not say what it was loaded from"))
    folder = Path(name) if Path(name).is_dir() else cached_checkpoint(name, revision=config.revision)
    if folder is None:
        raise MergeError(_WAYS.format(why=f"its original, {name}, is neither a folder nor in the hub's cache"))
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MergeError(_WAYS.format(why=f"{folder} has no config.json that can be read")) from None
    if written.get("quantization_config"):
        raise MergeError(_WAYS.format(why=f"what it was loaded from, {folder}, is quantised already"))
    return folder

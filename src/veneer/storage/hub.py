"""Where an adapter lies: a folder of this machine, or a repository on the Hugging Face hub."""

import os
from pathlib import Path
from typing import Any

from veneer.errors import AdapterFileError, check_kind
from veneer.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def adapter_folder(location: str | Path, *, subfolder: str | None = None, weights: bool = True, **hub: Any) -> Path:
    """The local folder of an adapter, downloaded if `location` is a hub id (`user/name`).

    Raises AdapterFileError if there is no such folder or repository, with what was tried, and ArgumentError
    for what is neither.
    """
    unknown = sorted(set(hub) - set(HUB_OPTIONS))
    if unknown:
        raise AdapterFileError(f"Unknown option {', '.join(unknown)}; for the hub there are {', '.join(HUB_OPTIONS)}.")
    check_kind(location, (str, os.PathLike), "An adapter folder or a hub id (user/name)")
    folder = Path(location) / (subfolder or "")
    text = str(location)
    try:
        if text and Path(location).exists():
            return folder
    except OSError as error:
        raise AdapterFileError(f"{text} cannot be read: {error.strerror or error}") from None
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise AdapterFileError(f"There is no folder {folder}, and {text!r} is not a hub id (user/name).")
    return _download(text, subfolder, weights, {name: value for name, value in hub.items() if value is not None})


def _download(repository: str, subfolder: str | None, weights: bool, hub: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        config = hf_hub_download(repository, CONFIG_FILE, subfolder=subfolder, **hub)
        if weights:
            hf_hub_download(repository, WEIGHTS_FILE, subfolder=subfolder, **hub)
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterFileError(
            f"There is no folder {repository}, and it could not be downloaded from the hub: {reason}"
        ) from None
    return Path(config).parent


def holds(location: str | Path, name: str, *, subfolder: str | None = None, **hub: Any) -> bool:
    """Whether a file of this name lies in the folder, or in the repository on the hub."""
    if Path(location).exists():
        return (Path(location) / (subfolder or "") / name).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(
            str(location), name, subfolder=subfolder, **{key: value for key, value in hub.items() if value is not None}
        )
    except EntryNotFoundError:
        return False
    return True

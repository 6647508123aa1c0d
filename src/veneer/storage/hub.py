"""Where an adapter lies: a folder of this machine, or a repository on the Hugging Face hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._version import __version__
from veneer.errors import AdapterFileError, check_kind
from veneer.storage.adapter_file import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from veneer.storage.hub_errors import failures, why_not_downloaded
from veneer.suggest import closest, did_you_mean

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# What programs say of the base model in the same call. An adapter goes where its layers are, and is no code.
OF_THE_BASE = (
    "device_map",
    "dtype",
    "max_memory",
    "offload_dir",
    "offload_folder",
    "offload_index",
    "torch_dtype",
    "trust_remote_code",
)
_WEB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_WHOLE_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OF_DIFFUSERS = "pytorch_lora_weights.safetensors"


def hub_api() -> "HfApi":
    """The hub at HF_ENDPOINT, told who asks."""
    from huggingface_hub import HfApi

    return HfApi(library_name="veneer", library_version=__version__)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `user/name`; it may be a relative folder as well."""
    return len(text) <= 96 and _HUB_ID.fullmatch(text) is not None


def adapter_folder(location: str | Path, *, subfolder: str | None = None, weights: bool = True, **hub: Any) -> Path:
    """The local folder of an adapter, downloaded if `location` is a hub id (`user/name`) and no folder.

    A downloaded folder is of one commit, even if somebody pushes meanwhile. Options that are about the base model
    (OF_THE_BASE) change nothing. Raises AdapterFileError if there is no such folder or repository, with what to do,
    and ArgumentError for what is neither.
    """
    hub = {name: value for name, value in hub.items() if name not in OF_THE_BASE}
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
    if page := _WEB.match(text):
        raise AdapterFileError(f"{text} is a page. An adapter on the hub is named by its id alone: {page[1]!r}.")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise AdapterFileError(
            f"There is no folder {folder}, and {text!r} is not a hub id (user/name).{_folder_like(text)}"
        )
    if hub.get("force_download") and hub.get("local_files_only"):
        raise AdapterFileError("force_download and local_files_only ask for opposite things: set one of them.")
    return _download(text, subfolder, weights, {name: value for name, value in hub.items() if value is not None})


def _download(repository: str, subfolder: str | None, weights: bool, hub: dict[str, Any]) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    api, name = hub_api(), CONFIG_FILE
    try:
        config = Path(api.hf_hub_download(repository, CONFIG_FILE, subfolder=subfolder, **hub))
        if weights:
            name = WEIGHTS_FILE
            api.hf_hub_download(repository, WEIGHTS_FILE, subfolder=subfolder, **{**hub, **_at_commit_of(config)})
    except LocalEntryNotFoundError as error:
        raise AdapterFileError(why_not_downloaded(repository, error, hub)) from None
    except EntryNotFoundError:
        raise AdapterFileError(_without_adapter(api, repository, subfolder, name, hub)) from None
    except failures() as error:
        raise AdapterFileError(why_not_downloaded(repository, error, hub) + _folder_like(repository)) from None
    return config.parent


def _at_commit_of(file: Path) -> dict[str, str]:
    """The revision that a file of the hub's cache belongs to: CACHE/models--user--name/snapshots/COMMIT/…."""
    parts = file.parts
    return {"revision": parts[parts.index("snapshots") + 1]} if "snapshots" in parts else {}


def _without_adapter(api: "HfApi", repository: str, subfolder: str | None, name: str, hub: dict[str, Any]) -> str:
    """What to do with a repository that lacks a file of an adapter, by what it has."""
    place = f"{repository}, folder {subfolder}," if subfolder else repository
    try:
        files = api.list_repo_files(repository, revision=hub.get("revision"), token=hub.get("token"))
    except failures():
        return f"{place} has no {name}, so it is not a whole adapter."
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    if name == WEIGHTS_FILE and f"{inside}{PICKLE_FILE}" in files:
        return (
            f"{place} holds its weights as {PICKLE_FILE}, a pickle, which can run code when it is read. If you trust "
            f"it, download it, convert it with safetensors.torch.save_file(torch.load(old, weights_only=True), "
            f"{WEIGHTS_FILE!r}), and load that folder."
        )
    folders = sorted(file.removesuffix(f"/{CONFIG_FILE}") for file in files if file.endswith(f"/{CONFIG_FILE}"))
    if name == CONFIG_FILE and CONFIG_FILE in files:
        folders = [*folders, "."]
    return f"{place} has no {name}{_kind_of_repository(files, folders, subfolder)}"


def _kind_of_repository(files: Sequence[str], folders: Sequence[str], subfolder: str | None) -> str:
    if folders == ["."]:
        return "; the adapter lies in its main folder: leave subfolder out."
    if folders:
        named = ", ".join(repr(folder) for folder in folders[:6])
        hint = did_you_mean(subfolder, folders) if subfolder else ""
        return f"; its adapters lie in folders: name one with subfolder= ({named}){hint or '.'}"
    if any(file in _WHOLE_MODEL for file in files):
        return (
            ": it looks like a whole model, not an adapter. Load it with transformers, "
            "AutoModelForCausalLM.from_pretrained or another AutoModel class."
        )
    if _OF_DIFFUSERS in files:
        return ": it looks like a LoRA of diffusers. Load it with load_lora_weights of its pipeline."
    shown = ", ".join(sorted(file for file in files if not file.startswith("."))[:6])
    return f"; it holds {shown}." if shown else "; it is empty."


def _folder_like(text: str) -> str:
    """A folder of this machine that a mistyped one may have meant, as " Did you mean …?"; or nothing."""
    path = Path(text).expanduser()
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    found = closest(path.name, beside) if path.parent != path else []
    return f" Did you mean the folder {path.with_name(found[0])}?" if found else ""


def holds(location: str | Path, name: str, *, subfolder: str | None = None, **hub: Any) -> bool:
    """Whether a file of this name lies in the folder, or in the repository on the hub."""
    return file_in(location, name, subfolder=subfolder, **hub) is not None


def file_in(location: str | Path, name: str, *, subfolder: str | None = None, **hub: Any) -> Path | None:
    """A file of the folder, or of the repository on the hub, as a path; None if there is none of this name."""
    if Path(location).exists():
        file = Path(location) / (subfolder or "") / name
        return file if file.is_file() else None
    from huggingface_hub.errors import EntryNotFoundError

    given = {key: value for key, value in hub.items() if value is not None}
    try:
        return Path(hub_api().hf_hub_download(str(location), name, subfolder=subfolder, **given))
    except EntryNotFoundError:
        return None
    except failures() as error:
        raise AdapterFileError(why_not_downloaded(str(location), error, given)) from None

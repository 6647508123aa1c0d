"""The arguments of transformers' `load_adapter`, sorted: where the adapter lies, and how to get at it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from veneer.errors import ArgumentError, ConfigError
from veneer.storage.hub import HUB_OPTIONS

# Fields of transformers' LoadStateDictConfig that say nothing here: an adapter goes where its layers are.
_OF_THE_BASE = ("device_map", "weight_mapping", "weights_only", "disable_mmap", "sharded_metadata")
# Options of a download that only say how it is shown or what is known of it already.
_OF_NO_MATTER = ("tqdm_class", "user_agent", "_commit_hash", "_adapter_model_path")
_LOCATION = "pretrained_model_name_or_path"


class Source(NamedTuple):
    """An adapter's place: a folder or hub id (None if none was given), a subfolder of it, options for the hub."""

    location: str | None
    subfolder: str | None
    hub: dict[str, Any]


def source_of(
    peft_model_id: str | None,
    adapter_kwargs: Mapping[str, Any] | None,
    load_config: Any,
    kwargs: Mapping[str, Any],
    *,
    local_files_only: bool,
) -> Source:
    """Where the adapter lies, from every argument that may say so; the later ones count.

    load_config  transformers' LoadStateDictConfig, from `from_pretrained`, with its download_kwargs
    kwargs       options for the hub, or fields of such a config

    Raises ArgumentError for an argument that transformers does not have, ConfigError for one that is not done here.
    """
    known = {*HUB_OPTIONS, *_OF_THE_BASE, "subfolder", "proxies", "download_kwargs", "use_safetensors", _LOCATION}
    if unknown := sorted(set(kwargs) - known):
        raise ArgumentError(f"load_adapter() has no argument {', '.join(unknown)}.")
    if kwargs.get("use_safetensors") is False:
        raise ConfigError("use_safetensors=False would read a pickle; adapters are read from safetensors.")
    from_config = {} if load_config is None else vars(load_config)
    named = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder", "proxies") if name in kwargs}
    layers = (from_config.get("download_kwargs"), kwargs.get("download_kwargs"), named, adapter_kwargs)
    options: dict[str, Any] = {"local_files_only": True} if local_files_only else {}
    for layer in layers:
        options |= {key: value for key, value in (layer or {}).items() if value is not None}
    for name in _OF_NO_MATTER:
        options.pop(name, None)
    location = peft_model_id or kwargs.get(_LOCATION) or from_config.get(_LOCATION)
    return Source(location, options.pop("subfolder", None) or None, options)

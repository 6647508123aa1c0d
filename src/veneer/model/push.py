"""Adapters of a model to the Hugging Face hub: saved as into any folder, with a card, then uploaded in one commit."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.config import LoraConfig
from veneer.errors import VeneerWarning
from veneer.storage.push import check_push_options, push_saved

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def push_adapters(
    save: Callable[[Path, Mapping[str, Any]], None],
    repo_id: str,
    configs: Iterable[LoraConfig],
    **options: Any,
) -> "CommitInfo":
    """Upload what `save(folder, card)` writes; `card` is what the model card says besides (`write_card`).

    options  those of `PushToHubMixin.push_to_hub`. Raises AdapterFileError, and what `save` raises.
    """
    given = check_push_options(options)
    tags = tuple(given.pop("tags", None) or ())
    for config in configs:
        _warn_of_local_base(config)
    return push_saved(
        lambda folder, repository: save(folder, {"location": repository, "tags": tags}),
        repo_id,
        what="Upload adapter",
        **given,
    )


def _warn_of_local_base(config: LoraConfig) -> None:
    name = config.base_model_name_or_path
    if name and Path(name).is_dir():
        warnings.warn(
            f"adapter_config.json will name the base model {name}, a folder of this machine: others cannot load it by "
            "that name. Set base_model_name_or_path of the adapter's config to the model's id on the hub before you "
            "push.",
            VeneerWarning,
            stacklevel=4,
        )

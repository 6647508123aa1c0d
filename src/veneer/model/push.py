"""Adapters of a model to the Hugging Face hub: saved as into any folder, with a card, then uploaded in one commit."""

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.config import LoraConfig, config_in
from veneer.errors import VeneerWarning
from veneer.model.card import write_card
from veneer.storage.adapter_file import check_integrity, read_tensors, read_weights_header
from veneer.storage.push import check_push_options, push_saved

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

LEFT_HERE = (".pt", ".pth", ".bin")  # pickles: a checkpoint's state of optimizer and random numbers


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


def push_folder(folder: Path, repo_id: str, **options: Any) -> "CommitInfo":
    """Upload an adapter folder, read and found whole before, with its model card.

    Its own README.md goes before that of the repository. Checkpoints and files that begin with a dot stay here.
    Raises AdapterFileError, ConfigError if the adapter's config cannot be used.
    """
    config = config_in(folder)
    header = read_weights_header(folder)
    check_integrity(folder, header, read_tensors(folder, header.tensors, header))

    def save(target: Path, card: Mapping[str, Any]) -> None:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith(".") and file.suffix not in LEFT_HERE:
                shutil.copyfile(file, target / file.name)
        write_card(target, **card)

    return push_adapters(save, repo_id, [config], **options)


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

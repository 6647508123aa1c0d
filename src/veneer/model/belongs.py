"""Whether what an adapter file holds belongs together and to this model, beyond names and shapes.

Each check raises AdapterFileError and does nothing otherwise.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import AdapterFileError, bullet_list
from veneer.layers.sharded import is_sharded, local, rows_here
from veneer.model.tensors import tied_keys
from veneer.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from veneer.storage.header import Header
from veneer.targets import Resolution

# What the numbers of an adapter go with. The weights file carries these too, so that an edited or exchanged
# adapter_config.json is noticed.
_TRAINED_WITH = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_NOTE = "veneer_trained_with"


def note_of(config: LoraConfig) -> dict[str, str]:
    """What the metadata of a weights file says of the settings that its numbers go with."""
    return {_NOTE: json.dumps(_trained_with(config))}


def _trained_with(config: LoraConfig) -> dict[str, Any]:
    return {field: getattr(config, field) for field in _TRAINED_WITH}


def _as_pairs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with patterns as lists of pairs: the first key that matches counts, so their order does."""
    return {field: list(value.items()) if isinstance(value, dict) else value for field, value in settings.items()}


def check_config_belongs(folder: Path, config: LoraConfig, header: Header) -> None:
    """The settings must be those that the weights were trained with, where the file notes them."""
    note = header.metadata.get(_NOTE)
    if note is None:
        return
    recorded, now = _as_pairs(json.loads(note)), _as_pairs(_trained_with(config))
    differing = [
        f"{field}: trained with {json.loads(note)[field]!r}, the config says {getattr(config, field)!r}"
        for field in _TRAINED_WITH
        if field in recorded and recorded[field] != now[field]
    ]
    if differing:
        raise AdapterFileError(
            bullet_list(
                f"{folder}: the weights were trained with other settings than the config says:",
                [
                    *differing,
                    "A and B were trained for one factor of their product (lora_alpha / r). With twice the lora_alpha "
                    "the update has twice the influence it was trained to have: outputs change at once, and further "
                    "training starts from a jump in the loss that can make it unstable.",
                    "Put the recorded setting back. To use an update more or less strongly on purpose, load it as it "
                    "is and call set_scale(adapter_name, factor); for another lora_alpha train a new adapter.",
                ],
            )
        )


def check_rank(folder: Path, config: LoraConfig, header: Header) -> None:
    """Say in one line that every rank differs, instead of listing every tensor."""
    ranks = {info.shape[0] for key, info in header.tensors.items() if key.endswith("lora_A.weight") and info.shape}
    if not config.rank_pattern and not config.target_parameters and len(ranks) == 1 and ranks != {config.r}:
        raise AdapterFileError(
            f"{folder}: {CONFIG_FILE} says r={config.r}, {WEIGHTS_FILE} holds rank {ranks.pop()}. They belong to two "
            "different adapters."
        )


def check_repeats_base(
    model: nn.Module,
    source: str,
    tensors: Mapping[str, Tensor],
    repeated: Mapping[str, str | None],
    replaced: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Base weights in an adapter file must be this base's: PEFT adds them for embeddings and output heads.

    replaced  rows that need not be, by parameter name, since the adapter has its own in their place
    """
    for key, parameter_name in repeated.items():
        if key not in tensors or parameter_name is None:
            continue
        own, given = model.state_dict()[parameter_name], tensors[key]
        if own.shape != given.shape or not _is_equal(own, given.to(own.dtype), replaced.get(parameter_name, ())):
            raise AdapterFileError(
                f"{source} brings its own {parameter_name} {list(given.shape)}, which differs "
                f"from this model's {list(own.shape)}: it was trained over a base with other or resized embeddings."
            )


def _is_equal(own: Tensor, given: Tensor, except_rows: tuple[int, ...]) -> bool:
    """Whether a weight of the base, or the shard of it on this rank, has these values."""
    mine = local(own).cpu()
    given = given[rows_here(own)] if is_sharded(own) else given
    if except_rows:
        counts = torch.ones(own.shape[0], dtype=torch.bool)
        counts[list(except_rows)] = False
        mine, given = mine[counts[rows_here(own)]], given[counts[rows_here(own)]]
    return torch.equal(mine, given)


def check_tied(folder: Path, tensors: Mapping[str, Tensor], resolution: Resolution) -> None:
    """What tied modules share is in the file once for each, and must be the same."""
    apart = [key for key, source, seen in tied_keys(resolution) if not torch.equal(tensors[key], seen(tensors[source]))]
    if apart:
        raise AdapterFileError(
            bullet_list(
                f"{Path(folder) / WEIGHTS_FILE}: ensure_weight_tying is set, but these are not what the modules they "
                "are tied to have: they were trained apart (PEFT loses the tie of a half-precision base). To load "
                "them as they are, give a config with ensure_weight_tying=False:",
                apart,
            )
        )

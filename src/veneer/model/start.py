"""Adapters that take their start off the base (PiSSA, OLoRA, CorDA, LoRA-GA), as the plain LoRA that files hold.

In memory such an adapter is s·(BA − B₀A₀) with frozen A₀ and B₀, over an untouched base. Written as [A; A₀] and
[B, −B₀] it is a LoRA of twice the rank, which every reader understands. Shapes: I in, O out, R rank.
"""

import math
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from veneer.config import LoraConfig
from veneer.config.init_names import DATA_DRIVEN, SUBTRACTING, split_name
from veneer.errors import AdapterFileError
from veneer.storage.adapter_file import Expected

START = ".start"  # the end of the name of A₀ and B₀ among an adapter's tensors; never in a file


def takes_off_its_start(config: LoraConfig) -> bool:
    """Whether adapters of this config take their start off the base."""
    choice = config.init_lora_weights
    return isinstance(choice, str) and split_name(choice)[0] in SUBTRACTING


def check_start_can_be_redone(config: LoraConfig, what: str) -> None:
    """Raise AdapterFileError if the base alone does not say what such an adapter took off it."""
    choice = str(config.init_lora_weights)
    method, niter = split_name(choice)
    if method in DATA_DRIVEN or niter is not None:
        raise AdapterFileError(
            f"{what}: what init_lora_weights={choice!r} took off the base came from data or chance, and cannot be "
            "found again. Save it as a plain LoRA instead: in Veneer by default, in PEFT with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )


def doubled(config: LoraConfig) -> LoraConfig:
    """The config of the plain LoRA of twice the rank, with the same scale in every layer."""
    more = math.sqrt(2) if config.use_rslora else 2
    return config.changed(
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
    )


def joined(tensors: Mapping[str, Tensor], stacked: Mapping[str, int]) -> dict[str, Tensor]:
    """An adapter's tensors with each factor and its start in one, as a file holds them.

    stacked  how many matrices have their A in one tensor, one below the other, by its name; left out where it is one
    """
    found = {key: value for key, value in tensors.items() if not key.endswith(START)}
    for key in found:
        if (start := tensors.get(key + START)) is not None:
            dim, sign = _half(key)
            parts = [_apart(value, key, stacked) for value in (found[key], sign * start)]
            found[key] = torch.cat(parts, dim=dim + 1).flatten(0, 1)
    return found


def split(tensors: Mapping[str, Tensor], halves: Set[str], stacked: Mapping[str, int]) -> dict[str, Tensor]:
    """The inverse of `joined` for the names in `halves`."""
    found = dict(tensors)
    for key in halves:
        dim, sign = _half(key)
        trained, start = _apart(tensors[key], key, stacked).chunk(2, dim=dim + 1)
        found |= {key: trained.flatten(0, 1), key + START: sign * start.flatten(0, 1)}
    return found


def joined_shapes(expected: Mapping[str, Expected], halves: Set[str]) -> dict[str, Expected]:
    """What a file holds, given what the adapter has."""
    found = dict(expected)
    for key in halves:
        dim, _ = _half(key)
        shape = list(expected[key].shape)
        shape[dim] *= 2
        found[key] = Expected(tuple(shape), expected[key].floating)
    return found


def _apart(value: Tensor, key: str, stacked: Mapping[str, int]) -> Tensor:
    """With one more dimension in front, for the matrices whose factors lie one below the other."""
    return value.unflatten(0, (stacked.get(key, 1), -1))


def _half(key: str) -> tuple[int, int]:
    """Along which dimension a factor and its start lie side by side, and the sign of the start."""
    return (0, 1) if key.removesuffix(".weight").endswith("_A") else (1, -1)

"""Field values in the one form that equal configs share and files hold."""

from collections.abc import Mapping
from typing import Any

from veneer.config.rules import ALL_LINEAR, TaskType
from veneer.config.sub_configs import SUB_CONFIGS, LoraRuntimeConfig

_LISTS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
)
_NONE_IF_EMPTY = ("layers_to_transform", "target_parameters", "layer_replication", "trainable_token_indices")


def tidied(name: str, value: Any) -> Any:
    """The value without sets, tuples, empty lists where None is meant, 16.0 for 16. Wrong values stay as they are."""
    if name in SUB_CONFIGS:
        return _tidied_sub_config(name, value)
    if name in _LISTS and isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if name in _LISTS and isinstance(value, tuple | range):
        value = list(value)
    if name in _NONE_IF_EMPTY and isinstance(value, list | dict) and not value:
        return None
    match name, value:
        case "layer_replication", list() if all(isinstance(pair, list | tuple) for pair in value):
            return [tuple(pair) for pair in value]
        case "modules_to_save", str():
            return [value]
        case "target_modules", str() if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        case "init_lora_weights", str():
            return value.lower()  # programs write "OLoRA" as well as "olora"
        case "rank_pattern" | "alpha_pattern", None:
            return {}
        case "lora_alpha", float() if value.is_integer():
            return int(value)  # some servers read whole numbers only
        case "task_type", str() if value in list(TaskType):
            return TaskType(value)
    return value


def _tidied_sub_config(name: str, value: Any) -> Any:
    """A sub-config from the dict that a file holds. Raises ConfigError for one that is wrong."""
    if name == "runtime_config":
        return LoraRuntimeConfig.of(value) if value is None or isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        return SUB_CONFIGS[name].from_dict(value) if value else None
    return value

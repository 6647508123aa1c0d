"""What each field of a LoraConfig may be, and which fields cannot both be meant: every rule, in one place."""

import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from veneer.config.init_names import INIT_NAMES, OPTIONS_FIELD, known_init
from veneer.config.patterns import pattern_fault
from veneer.config.sub_configs import SUB_CONFIGS

if TYPE_CHECKING:
    from veneer.config.lora_config import LoraConfig

ALL_LINEAR = "all-linear"
MAX_RANK = 1 << 16  # above what any weight can have; a slip such as r=10**8 would ask for terabytes
BIASES = ("none", "all", "lora_only")


class PeftType(StrEnum):
    """The method of an adapter, as files and other libraries name it: there is one."""

    LORA = "LORA"


class TaskType(StrEnum):
    """What the model is for, as `LoraConfig(task_type="CAUSAL_LM")`; with the two of classification and with question
    answering, the model's head is trained in full and saved with the adapter.
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rank(value: Any) -> bool:
    return _is_int(value, 1) and value <= MAX_RANK


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_pattern(value: Any) -> bool:
    return _is_text(value) and pattern_fault(value) is None


def why_no_pattern(name: str, value: Any) -> str:
    """The first fault among the regular expressions that a field holds, to be added to what is allowed."""
    match name, value:
        case "target_modules" | "exclude_modules" | "layers_pattern", str():
            texts = [value]
        case "layers_pattern" | "rank_pattern" | "alpha_pattern", list() | dict():
            texts = [text for text in value if isinstance(text, str)]
        case _:
            texts = []
    return next((f" ({fault})" for text in texts if (fault := pattern_fault(text))), "")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _or_none(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or right(value)


def _is_sub_config(name: str) -> tuple[Callable[[Any], bool], str]:
    cls = SUB_CONFIGS[name]
    return _or_none(lambda v: isinstance(v, cls)), f"must be None, a {cls.__name__} or a dict of its fields"


def _is_indices(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(_is_int(index, 0) for index in value)
        and len(set(value)) == len(value)
    )


def _all_indices(value: dict[str, Any]) -> bool:
    return all(map(_is_indices, value.values()))


def _is_stretch(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_int(value[0], 0) and _is_int(value[1], value[0] + 1)


_NAMES_OR_PATTERN = "must be a list of different module names, or one regular expression as a string"

RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "task_type": (_or_none(lambda v: v in list(TaskType)), f"must be None or one of {', '.join(TaskType)}"),
    "base_model_name_or_path": (_or_none(lambda v: isinstance(v, str)), "must be None, a path or a hub id"),
    "revision": (_or_none(_is_text), "must be None or a branch, tag or commit"),
    "inference_mode": (lambda v: isinstance(v, bool), "must be True or False"),
    "r": (_is_rank, f"must be an integer from 1 to {MAX_RANK:,}"),
    "target_modules": (
        _or_none(lambda v: v == [] or _is_names(v) or _is_pattern(v)),
        f"{_NAMES_OR_PATTERN}, {ALL_LINEAR!r} or None",
    ),
    "exclude_modules": (_or_none(lambda v: v == [] or _is_names(v) or _is_pattern(v)), f"{_NAMES_OR_PATTERN}, or None"),
    "lora_alpha": (_is_positive, "must be a positive finite number"),
    "lora_dropout": (_is_probability, "must be a probability of at least 0 and below 1"),
    "fan_in_fan_out": (lambda v: isinstance(v, bool), "must be True or False"),
    "bias": (lambda v: isinstance(v, str) and v in BIASES, f"must be one of {', '.join(BIASES)}"),
    "use_rslora": (lambda v: isinstance(v, bool), "must be True or False (a string is neither)"),
    "modules_to_save": (
        _or_none(lambda v: v == [] or _is_names(v)),
        "must be None or a list of different module names",
    ),
    "init_lora_weights": (
        known_init,
        f"must be True, False, {', '.join(map(repr, INIT_NAMES))}, or 'pissa_niter_' and a number",
    ),
    "layers_to_transform": (
        _or_none(lambda v: _is_int(v, 0) or (isinstance(v, list) and all(_is_int(i, 0) for i in v))),
        "must be None, a layer index or a list of layer indices, counted from 0",
    ),
    "layers_pattern": (
        _or_none(lambda v: v == [] or _is_pattern(v) or (_is_names(v) and all(map(_is_pattern, v)))),
        "must be None or the name (or names) of a list of layers, such as 'layers'",
    ),
    "rank_pattern": (
        lambda v: isinstance(v, dict) and all(_is_pattern(k) and _is_rank(rank) for k, rank in v.items()),
        f"must map names or regular expressions to integers from 1 to {MAX_RANK:,}",
    ),
    "alpha_pattern": (
        lambda v: isinstance(v, dict) and all(_is_pattern(k) and _is_positive(alpha) for k, alpha in v.items()),
        "must map names or regular expressions to positive finite numbers",
    ),
    "use_dora": (lambda v: isinstance(v, bool), "must be True or False (a string is neither)"),
    "lora_bias": (lambda v: isinstance(v, bool), "must be True or False (a string is neither)"),
    "target_parameters": (
        _or_none(_is_names),
        "must be None or a list of different parameter names, such as 'mlp.experts.gate_up_proj'",
    ),
    "trainable_token_indices": (
        _or_none(lambda v: _is_indices(v) or (isinstance(v, dict) and all(map(_is_text, v)) and _all_indices(v))),
        "must be None, a list of different token numbers, or such lists by the name of an embedding",
    ),
    "layer_replication": (
        _or_none(lambda v: isinstance(v, list) and bool(v) and all(map(_is_stretch, v))),
        "must be None or a list of (start, end) with 0 <= start < end",
    ),
    "ensure_weight_tying": (lambda v: isinstance(v, bool), "must be True or False (a string is neither)"),
    "alora_invocation_tokens": (
        _or_none(lambda v: isinstance(v, list) and bool(v) and all(_is_int(token, 0) for token in v)),
        "must be None or the token numbers of the text that invokes the adapter, in order",
    ),
    **{name: _is_sub_config(name) for name in SUB_CONFIGS},
}


def _settings_without_effect(config: "LoraConfig") -> list[str]:
    problems = [
        f"{name} does nothing without init_lora_weights={method!r}: set both or neither"
        for method, name in OPTIONS_FIELD.items()
        if getattr(config, name) is not None and config.init_lora_weights != method
    ]
    if config.runtime_config.ephemeral_gpu_offload:
        problems.append(
            "ephemeral_gpu_offload does nothing here: norms are computed where the weight lies; leave it out"
        )
    return problems


def _clashes_of_rows_and_replicas(config: "LoraConfig") -> list[str]:
    problems = []
    if config.trainable_token_indices and config.alora_invocation_tokens:
        problems.append(
            "trainable_token_indices cannot go with alora_invocation_tokens: a token before the invocation would keep "
            "the row of the base"
        )
    if config.layer_replication and config.init_lora_weights == "loftq" and config.rank_pattern:
        problems.append(
            "layer_replication and init_lora_weights='loftq' cannot go with rank_pattern: replicas share the weight "
            "that LoftQ replaces, so each must replace it by the same, which depends on the rank"
        )
    return problems


def clashes(config: "LoraConfig") -> list[str]:
    """Where two fields, each right by itself, cannot both be meant."""
    problems = [*_settings_without_effect(config), *_clashes_of_rows_and_replicas(config)]
    if config.target_modules == [] and not config.target_parameters:
        problems.append("target_modules=[]: must be names of layers, unless target_parameters names parameters")
    is_pattern = isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR
    if is_pattern and config.layers_to_transform is not None:
        problems.append(
            "layers_to_transform cannot go with a regular expression in target_modules: "
            "write the layer numbers into the expression, or give a list of names"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        problems.append("layers_pattern does nothing without layers_to_transform: set both or neither")
    if isinstance(config.target_modules, list):
        for name in sorted(set(config.target_modules) & set(config.modules_to_save or [])):
            problems.append(f"{name} is in both target_modules and modules_to_save: choose one")
    if config.lora_bias and config.use_dora:
        problems.append(
            "lora_bias cannot go with use_dora: a magnitude decomposes a weight, and has no place for a bias"
        )
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        problems.append(
            f"lora_bias goes with init_lora_weights True or False only, not with {config.init_lora_weights!r}"
        )
    return problems

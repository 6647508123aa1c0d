"""LoraConfig: what to adapt and how. Flat data; every rule is checked here, in one place.

Field names, defaults and JSON are PEFT's, so that an `adapter_config.json` written by either is read by both.
"""

import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import regex

from veneer.errors import ConfigError, UnknownFieldError, bullet_list
from veneer.storage.adapter_file import CONFIG_FILE, read_config
from veneer.storage.hub import adapter_folder
from veneer.storage.write import write_file
from veneer.suggest import did_you_mean

ALL_LINEAR = "all-linear"
PATTERN_SECONDS = 1.0  # how long one regular expression may take on one name
MAX_PATTERN = 1000  # characters
MAX_RANK = 1 << 16  # above what any weight can have; a slip such as r=10**8 would ask for terabytes

_Class = TypeVar("_Class")


class TaskType(StrEnum):
    """What the model is for; it decides which head is trained and saved with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


INITS = (True, False, "gaussian")
INITS_TO_COME = ("orthogonal", "pissa", "olora", "loftq", "eva", "corda", "lora_ga", "mica")
BIASES = ("none", "all", "lora_only")

# Fields of PEFT 0.21 that Veneer does not have yet, with the value that means "not used".
NOT_YET: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "runtime_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Fields of PEFT that say nothing about the adapter itself.
NOTES = ("auto_mapping", "peft_version", "megatron_core", "qalora_group_size")
# Fields without which a file is not readable: a default would be a guess at how the adapter was trained.
REQUIRED_IN_FILES = ("peft_type", "r", "lora_alpha", "target_modules")
# Fields that may change on a config in use, because no number depends on them.
FREE = frozenset({"base_model_name_or_path", "revision", "inference_mode", "task_type"})


def _refusing_unknown_fields(cls: type[_Class]) -> type[_Class]:
    """Let a dataclass's constructor name fields that do not exist, and pass over PEFT's that are not used."""
    generated = cls.__init__

    @wraps(generated)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        problems = [problem for name, value in given.items() if (problem := _not_a_field(name, value))]
        if problems:
            raise UnknownFieldError(bullet_list("LoraConfig cannot be made:", problems))
        generated(self, *args, **{name: value for name, value in given.items() if name in _field_names()})

    cls.__init__ = __init__
    return cls


@_refusing_unknown_fields
@dataclass
class LoraConfig:
    """Which layers get an adapter, and what kind.

    task_type         what the model is for (TaskType or its name); classification heads are then trained too
    base_model_name_or_path, revision   the model the adapter belongs to; filled in when it is attached
    inference_mode    True: loaded for use, not for training
    r                 rank of the update, at least 1
    lora_alpha        the update is scaled by lora_alpha / r
    target_modules    names (a full path, or its last parts), a regular expression for the full path,
                      "all-linear" or None for every linear layer except the output head
    exclude_modules   names or a regular expression; wins over target_modules
    lora_dropout      probability in [0, 1) of dropping an input of the update, in training
    fan_in_fan_out    True if the targets store their weight as (in, out), as GPT-2's Conv1D does
    bias              "none", "all" or "lora_only": which biases of the base are trained and saved too
    use_rslora        scale by lora_alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732)
    use_dora          learn a magnitude for each output row (https://arxiv.org/abs/2402.09353)
    modules_to_save   names of modules trained in full and saved with the adapter
    init_lora_weights True: A random, B zero; False: both random; "gaussian": A normal with deviation 1/r, B zero
    layers_to_transform  only layers with these indices; counted by the first number in a module's path
    layers_pattern    the name (or names) of the list of layers that number belongs to
    rank_pattern      {name or regular expression for the end of a path: rank} for layers that differ
    alpha_pattern     {the same: alpha}

    Raises ConfigError naming every field that is wrong, its value and what is allowed.
    """

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False

    peft_type: ClassVar[str] = "LORA"
    _in_use: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        raise TypeError("LoraConfig is data; it is not meant to be subclassed.")

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError with every problem, or do nothing."""
        problems = [
            f"{name}={getattr(self, name)!r}: {allowed}{_why_no_pattern(name, getattr(self, name))}"
            for name, (right, allowed) in _RULES.items()
            if not right(getattr(self, name))
        ]
        if not problems:
            problems = _clashes(self)
        if problems:
            raise ConfigError(bullet_list("LoraConfig cannot be right:", problems))

    def __setattr__(self, name: str, value: Any) -> None:
        if problem := _not_a_field(name, value):
            raise UnknownFieldError(f"LoraConfig cannot be changed: {problem}")
        if name not in _field_names():
            return
        if self._in_use and name not in FREE:
            raise ConfigError(
                f"{name} cannot be changed to {value!r}: this config describes an adapter that exists, and its weights "
                f"go with {name}={getattr(self, name, None)!r}. Make a new LoraConfig for a new adapter."
            )
        object.__setattr__(self, name, _tidied(name, value))

    def changed(self, **changes: Any) -> "LoraConfig":
        """A checked copy with `changes`, open to further ones."""
        return LoraConfig(**{**self._as_arguments(), **changes})

    def in_use(self, **changes: Any) -> "LoraConfig":
        """A checked copy with `changes`, closed against changes that its adapter would not follow."""
        copy = self.changed(**changes)
        object.__setattr__(copy, "_in_use", True)
        return copy

    def _as_arguments(self) -> dict[str, Any]:
        return {f.name: _copied(getattr(self, f.name)) for f in fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON values, with PEFT's `peft_type`."""
        data = {
            name: value.value if isinstance(value, TaskType) else value for name, value in self._as_arguments().items()
        }
        return {"peft_type": self.peft_type, **data}

    def to_json(self) -> str:
        """The text of an `adapter_config.json`, sorted by field. The order of a pattern's keys counts, so it stays."""
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "the given data") -> "LoraConfig":
        """The config that the fields of an `adapter_config.json` describe.

        Fields of PEFT that Veneer does not know are ignored if they are unused there, and refused by name if not.
        Raises ConfigError.
        """
        known = _field_names()
        problems = [
            f"{name}: missing, and a default would be a guess" for name in REQUIRED_IN_FILES if name not in data
        ]
        if data.get("target_modules", ALL_LINEAR) is None:
            problems.append("target_modules=None: the file does not say which layers were trained")
        if "peft_type" in data and (problem := _not_a_field("peft_type", data["peft_type"])):
            problems.append(problem)
        for name, value in data.items():
            if name in known or name in NOTES or name == "peft_type":
                continue
            if value not in (NOT_YET.get(name), None, False, {}, []):
                hint = "not available yet" if name in NOT_YET else f"unknown field{did_you_mean(name, known)}"
                problems.append(f"{name}={value!r}: {hint}; it may change what the adapter computes")
        if problems:
            raise ConfigError(bullet_list(f"{source} does not describe an adapter that can be used:", problems))
        given = {name: value for name, value in data.items() if name in known}
        saved = given.get("modules_to_save")
        if isinstance(saved, list):  # PEFT adds the head of a classifier a second time
            given["modules_to_save"] = [name for i, name in enumerate(saved) if name not in saved[:i]]
        try:
            return cls(**given)
        except ConfigError as error:
            raise type(error)(f"{source}: {error}") from None

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` into a folder (made if missing)."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CONFIG_FILE, self.to_json().encode())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> "LoraConfig":
        """Read a config from an adapter folder or a hub id (`revision=`, `token=`, `cache_dir=` as on the hub).

        Raises AdapterFileError if there is none, ConfigError if it cannot be used.
        """
        folder = adapter_folder(pretrained_model_name_or_path, subfolder=subfolder, weights=False, **hub)
        return cls.from_dict(read_config(folder), source=str(folder / CONFIG_FILE))


PeftConfig = LoraConfig

# Words people carry over from other libraries and papers.
_ALIASES: Mapping[str, str] = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
}


def _field_names() -> list[str]:
    return [f.name for f in fields(LoraConfig)]


def _not_a_field(name: str, value: Any) -> str | None:
    """What is wrong with setting `name`; None if it is a field, or one of PEFT's at the value that means "not used"."""
    if name in _field_names() or name in NOTES:
        return None
    if name == "peft_type":
        return None if value == LoraConfig.peft_type else f"peft_type={value!r}: only 'LORA' adapters can be used"
    if name in NOT_YET:
        return None if value in (NOT_YET[name], None) else f"{name}={value!r}: not available yet; leave it out"
    alias = _ALIASES.get(name)
    return f"{name}: no such field{f', did you mean {alias!r}?' if alias else did_you_mean(name, _field_names())}"


_NAME_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")


def _tidied(name: str, value: Any) -> Any:
    """The value in the one form that equal configs share and files hold: no sets, no tuples, no 16.0 for 16."""
    if name in _NAME_LISTS and isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if name in _NAME_LISTS and isinstance(value, tuple | range):
        value = list(value)
    match name, value:
        case "modules_to_save", str():
            return [value]
        case "target_modules", str() if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        case "rank_pattern" | "alpha_pattern", None:
            return {}
        case "lora_alpha", float() if value.is_integer():
            return int(value)  # some servers read whole numbers only
        case "layers_to_transform", []:
            return None
        case "task_type", str() if value in list(TaskType):
            return TaskType(value)
    return value


def rank_and_alpha(config: LoraConfig, path: str) -> tuple[int, float]:
    """The rank and alpha of the layer at `path`: the first pattern that matches, or the config's own."""
    rank = next((v for key, v in config.rank_pattern.items() if matches_end(key, path)), config.r)
    alpha = next((v for key, v in config.alpha_pattern.items() if matches_end(key, path)), config.lora_alpha)
    return rank, alpha


def matches_end(pattern: str, path: str) -> bool:
    """Whether a pattern key (a name or a regular expression) matches the end of a path, at a dot."""
    return matches(rf"(?:.*\.)?(?:{pattern})", path)


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a whole path. Raises ConfigError if that takes over a second."""
    return whole_match(pattern, path) is not None


def whole_match(pattern: str, path: str) -> regex.Match[str] | None:
    """The match of a regular expression with a whole path. Raises ConfigError if that takes over a second."""
    try:
        return regex.fullmatch(pattern, path, timeout=PATTERN_SECONDS)
    except TimeoutError:
        raise ConfigError(
            f"The pattern {pattern!r} takes over {PATTERN_SECONDS:g} s on {path!r}. "
            "Nested repetitions such as (a+)+ do that; write it without them."
        ) from None


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict) else value


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rank(value: Any) -> bool:
    return _is_int(value, 1) and value <= MAX_RANK


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_pattern(value: Any) -> bool:
    return _is_text(value) and _pattern_fault(value) is None


def _pattern_fault(value: str) -> str | None:
    """Why a text is no regular expression, here and for PEFT, which reads the file with `re`; None if it is one."""
    if len(value) > MAX_PATTERN:
        return f"{value[:40]!r}… has {len(value):,} characters, at most {MAX_PATTERN:,} are allowed"
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(value)
            regex.compile(value)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return f"{value!r} is not a regular expression: {error}"
    return None


def _why_no_pattern(name: str, value: Any) -> str:
    """The first fault among the regular expressions that a field holds, to be added to what is allowed."""
    match name, value:
        case "target_modules" | "exclude_modules" | "layers_pattern", str():
            texts = [value]
        case "layers_pattern" | "rank_pattern" | "alpha_pattern", list() | dict():
            texts = [text for text in value if isinstance(text, str)]
        case _:
            texts = []
    return next((f" ({fault})" for text in texts if (fault := _pattern_fault(text))), "")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _or_none(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or right(value)


def _is_init(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value in INITS)


_NAMES_OR_PATTERN = "must be a list of different module names, or one regular expression as a string"

_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "task_type": (_or_none(lambda v: v in list(TaskType)), f"must be None or one of {', '.join(TaskType)}"),
    "base_model_name_or_path": (_or_none(lambda v: isinstance(v, str)), "must be None, a path or a hub id"),
    "revision": (_or_none(_is_text), "must be None or a branch, tag or commit"),
    "inference_mode": (lambda v: isinstance(v, bool), "must be True or False"),
    "r": (_is_rank, f"must be an integer from 1 to {MAX_RANK:,}"),
    "target_modules": (
        _or_none(lambda v: _is_names(v) or _is_pattern(v)),
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
        _is_init,
        f"must be True, False or 'gaussian' ({', '.join(INITS_TO_COME)}: not available yet)",
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
}


def _clashes(config: LoraConfig) -> list[str]:
    """Where two fields, each right by itself, cannot both be meant."""
    problems = []
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
    return problems

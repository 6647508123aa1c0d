"""LoraConfig: what to adapt and how. Flat data, checked whenever it is made.

Field names, defaults and JSON are PEFT's, so that an `adapter_config.json` written by either is read by both.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from veneer.config.init_names import OPTIONS_FIELD
from veneer.config.patterns import first_match
from veneer.config.rules import ALL_LINEAR, RULES, PeftType, TaskType, clashes, why_no_pattern
from veneer.config.sub_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig, SubConfig
from veneer.config.tidy import tidied
from veneer.errors import ConfigError, UnknownFieldError, bullet_list
from veneer.storage.adapter_file import CONFIG_FILE, read_config
from veneer.storage.hub import adapter_folder
from veneer.storage.push import check_push_options, push_saved
from veneer.storage.write import write_file
from veneer.suggest import did_you_mean

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_Class = TypeVar("_Class")

# Fields of PEFT 0.21 that Veneer does not have yet, with the value that means "not used".
NOT_YET: Mapping[str, Any] = {
    "arrow_config": None,
    "kasa_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Fields of PEFT that say nothing about the adapter itself.
NOTES = ("auto_mapping", "peft_version", "megatron_core", "qalora_group_size")
# Fields without which a file is not readable: a default would be a guess at how the adapter was trained.
REQUIRED_IN_FILES = ("peft_type", "r", "lora_alpha", "target_modules")
# Initialisations that are over once an adapter is saved: its values say all.
PAST_INITS = ("orthogonal", "eva")
# The initialisation that a sub-config belongs to.
OPTIONS_OF: Mapping[str, str] = {field: method for method, field in OPTIONS_FIELD.items()}
# Fields that may change on a config in use, because no number depends on them.
FREE = frozenset({"base_model_name_or_path", "revision", "inference_mode", "task_type"})
_OF_NO_LAYER = frozenset({"base_model_name_or_path", "revision", "inference_mode", "runtime_config"})
# Fields that set how strongly an update acts, and what to do instead of changing them.
_SCALING = ("lora_alpha", "alpha_pattern", "use_rslora")
_BY_ITSELF = (
    " To save it as a plain LoRA nothing need be changed: "
    "save_pretrained does so, and remembers the start; leave the line out."
)
_SCALE_BY_NAME = " To use the trained update more or less strongly, call set_scale(adapter_name, factor) on the model."

# Words people carry over from other libraries and papers.
_ALIASES: Mapping[str, str] = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
}


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

    >>> LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    task_type         what the model is for (TaskType or its name); classification heads are then trained too
    base_model_name_or_path, revision   the model the adapter belongs to; filled in when it is attached
    inference_mode    True: loaded for use, not for training
    r                 rank of the update, at least 1
    lora_alpha        the update is scaled by lora_alpha / r
    target_modules    names (a full path, or its last parts), a regular expression for the full path,
                      "all-linear" or None for every linear layer except the output head; with target_parameters, []
                      and None mean no layer
    exclude_modules   names or a regular expression; wins over target_modules
    lora_dropout      probability in [0, 1) of dropping an input of the update, in training
    fan_in_fan_out    True if the targets store their weight as (in, out), as GPT-2's Conv1D does
    bias              "none", "all" or "lora_only": which biases of the base are trained and saved too
    use_rslora        scale by lora_alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732)
    use_dora          learn a magnitude for each output row (https://arxiv.org/abs/2402.09353)
    modules_to_save   names of modules trained in full and saved with the adapter
    init_lora_weights True: A random, B zero; False: both random; "gaussian": A normal with deviation 1/r, B zero;
                      "orthogonal", "pissa", "pissa_niter_16", "olora", "mica", "loftq"; "eva", "corda" and "lora_ga"
                      start from data
    layers_to_transform  only layers with these indices; counted by the first number in a module's path
    layers_pattern    the name (or names) of the list of layers that number belongs to
    rank_pattern      {name or regular expression for the end of a path: rank} for layers that differ
    alpha_pattern     {the same: alpha}
    loftq_config, eva_config, corda_config, lora_ga_config  settings of those initialisations
    lora_bias         add a trained bias to each update
    target_parameters names (full, or their last parts) of parameters to adapt that are no layer's weight, matrices or
                      stacks of them: "mlp.experts.gate_up_proj"
    trainable_token_indices  tokens whose rows of the embedding are trained in full: a list for the input embedding, or
                      {name of an embedding: list}
    layer_replication [(start, end), …]: build the stack of layers from these stretches of itself, sharing weights
    ensure_weight_tying  let what is trained on tied embeddings stay tied
    alora_invocation_tokens  the adapter acts on tokens from the last occurrence of these on (activated LoRA,
                      https://arxiv.org/abs/2504.12397)

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
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    ensure_weight_tying: bool = False
    alora_invocation_tokens: list[int] | None = None
    loftq_config: LoftQConfig | None = None
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    runtime_config: LoraRuntimeConfig = LoraRuntimeConfig()

    peft_type: ClassVar[PeftType] = PeftType.LORA
    _agreed: ClassVar[dict[str, Any] | None] = None  # of a config in use: what its adapter was made with

    def __init_subclass__(cls) -> None:
        raise TypeError("LoraConfig is data; it is not meant to be subclassed.")

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError with every problem, or do nothing."""
        problems = [
            f"{name}={getattr(self, name)!r}: {allowed}{why_no_pattern(name, getattr(self, name))}"
            for name, (right, allowed) in RULES.items()
            if not right(getattr(self, name))
        ]
        if not problems:
            problems = clashes(self)
        if problems:
            raise ConfigError(bullet_list("LoraConfig cannot be right:", problems))

    def __setattr__(self, name: str, value: Any) -> None:
        if problem := _not_a_field(name, value):
            raise UnknownFieldError(f"LoraConfig cannot be changed: {problem}")
        if name not in _field_names():
            return
        if self._agreed is not None and name not in FREE:
            raise ConfigError(
                f"{name} cannot be changed to {value!r}: this config describes an adapter that exists, and its weights "
                f"go with {name}={getattr(self, name, None)!r}. Make a new LoraConfig for a new adapter."
                f"{_SCALE_BY_NAME if name in _SCALING else ''}{_BY_ITSELF if name == 'init_lora_weights' else ''}"
            )
        object.__setattr__(self, name, tidied(name, value))

    def changed(self, **changes: Any) -> "LoraConfig":
        """A checked copy with `changes`, open to further ones."""
        return LoraConfig(**{**self._as_arguments(), **changes})

    def in_use(self, **changes: Any) -> "LoraConfig":
        """A checked copy with `changes`, closed against changes that its adapter would not follow."""
        copy = self.changed(**changes)
        object.__setattr__(copy, "_agreed", copy._as_arguments())
        return copy

    def check_unedited(self) -> None:
        """Raise ConfigError if a list or pattern of a config in use was changed in place, unseen until now."""
        for name, agreed in (self._agreed or {}).items():
            now = getattr(self, name)
            if name not in FREE and json.dumps(now, default=_as_json) != json.dumps(agreed, default=_as_json):
                raise ConfigError(f"{name} was changed to {now!r} in place, but its adapter was made with {agreed!r}.")

    def means_as(self, used: "LoraConfig") -> bool:
        """Whether this says of a model's layers just what a config in use said when its adapter was made."""
        agreed = used._agreed or {}
        return all(
            name in agreed and _as_text(name, getattr(self, name)) == _as_text(name, agreed[name])
            for name in _field_names()
            if name not in _OF_NO_LAYER
        )

    def _as_arguments(self) -> dict[str, Any]:
        return {f.name: _copied(getattr(self, f.name)) for f in fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON values, with PEFT's `peft_type`; not `runtime_config`, which is for one run."""
        data = {
            name: _as_json(value) if isinstance(value, SubConfig | TaskType) else value
            for name, value in self._as_arguments().items()
            if name != "runtime_config"
        }
        data["loftq_config"] = data["loftq_config"] or {}  # as PEFT writes it
        return {"peft_type": str(self.peft_type), **data}

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
        if data.get("target_modules", ALL_LINEAR) is None and not data.get("target_parameters"):
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
        if given.get("init_lora_weights") in PAST_INITS:
            given |= {"init_lora_weights": True}
        # how a start was made that is over by now, as PEFT leaves it in the files that it converts
        given = {
            n: value for n, value in given.items() if OPTIONS_OF.get(n, "") in ("", given.get("init_lora_weights"))
        }
        given.pop("runtime_config", None)
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

    def push_to_hub(self, repo_id: str, **options: Any) -> "CommitInfo":
        """Upload `adapter_config.json` alone, in one commit; options as of `PeftModel.push_to_hub`.

        Raises AdapterFileError that says what to do.
        """
        given = check_push_options(options)
        given.pop("tags", None)
        return push_saved(lambda folder, _: self.save_pretrained(folder), repo_id, what="Upload config", **given)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> "LoraConfig":
        """Read a config from an adapter folder or a hub id (`revision=`, `token=`, `cache_dir=` as on the hub).

        Raises AdapterFileError if there is none, ConfigError if it cannot be used.
        """
        folder = adapter_folder(pretrained_model_name_or_path, subfolder=subfolder, weights=False, **hub)
        return config_in(folder)


def config_in(folder: Path) -> LoraConfig:
    """The config of the adapter in a folder. Raises AdapterFileError if there is none, ConfigError if it is no use."""
    return LoraConfig.from_dict(read_config(folder), source=str(folder / CONFIG_FILE))


def rank_and_alpha(config: LoraConfig, path: str) -> tuple[int, float]:
    """The rank and alpha of the layer at `path`: the first pattern that matches, or the config's own."""
    rank_key, alpha_key = first_match(config.rank_pattern, path), first_match(config.alpha_pattern, path)
    rank = config.r if rank_key is None else config.rank_pattern[rank_key]
    return rank, config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]


@cache
def _field_names() -> tuple[str, ...]:
    return tuple(f.name for f in fields(LoraConfig))


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


def _as_json(value: Any) -> Any:
    """A sub-config or a task as JSON can hold it."""
    return value.to_dict() if isinstance(value, SubConfig) else str(value)


def _as_text(name: str, value: Any) -> str:
    """A field as text, the same where it means the same: the order of the keys of a pattern counts, of targets not."""
    value = sorted(value) if name == "target_modules" and isinstance(value, list) else value
    return json.dumps(value, default=_as_json)


def _copied(value: Any) -> Any:
    return deepcopy(value) if isinstance(value, list | dict) else value

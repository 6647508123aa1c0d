"""The settings of single methods, each a small config inside LoraConfig. Names, defaults and JSON are PEFT's.

A sub-config is checked when it is made and cannot be changed: make another one, or use `dataclasses.replace`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import wraps
from os import PathLike, fspath
from typing import Any, ClassVar, TypeVar

from veneer.errors import ConfigError, UnknownFieldError, bullet_list
from veneer.suggest import did_you_mean

_Class = TypeVar("_Class", bound="type[SubConfig]")
_Self = TypeVar("_Self", bound="SubConfig")
# What a field may be: a test and the same in words.
Rule = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(*allowed: Any) -> Rule:
    def right(value: Any) -> bool:
        return not isinstance(value, bool) and any(type(value) is type(a) and value == a for a in allowed)

    return right, f"must be one of {', '.join(map(repr, allowed))}"


_FLAG: Rule = (lambda v: isinstance(v, bool), "must be True or False (a string is neither)")
_FILE: Rule = (lambda v: v is None or (isinstance(v, str) and bool(v.strip())), "must be None or the path of a file")


@dataclass(frozen=True)
class SubConfig:
    """What every sub-config can do; the fields and their rules are its subclasses'."""

    rules: ClassVar[Mapping[str, Rule]] = {}

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), PathLike):
                object.__setattr__(self, field.name, fspath(value))
        problems = [
            f"{name}={getattr(self, name)!r}: {allowed}"
            for name, (right, allowed) in self.rules.items()
            if not right(getattr(self, name))
        ]
        if problems:
            raise ConfigError(bullet_list(f"{type(self).__name__} cannot be right:", problems))

    def to_dict(self) -> dict[str, Any]:
        """Every field, as `adapter_config.json` holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[_Self], data: Mapping[str, Any]) -> _Self:
        """The sub-config that a mapping describes; a field that is left out has its default.

        Raises ConfigError for values that are not allowed, UnknownFieldError for names that are no fields.
        """
        return cls(**{str(name): value for name, value in data.items()})

    @classmethod
    def of(cls: type[_Self], value: "Mapping[str, Any] | SubConfig | None") -> _Self:
        """The sub-config that `value` is or describes; None and {} are all defaults. Raises ConfigError."""
        if isinstance(value, cls):
            return value
        if value is None or isinstance(value, Mapping):
            return cls.from_dict(value or {})
        raise ConfigError(f"{value!r} cannot be used as {cls.__name__}: give a {cls.__name__}, a dict or None.")


def _refusing_unknown_fields(cls: _Class) -> _Class:
    """Let the constructor name every argument that is no field."""
    generated = cls.__init__
    names = [f.name for f in fields(cls)]

    @wraps(generated)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        problems = [f"{name}: no such field{did_you_mean(name, names)}" for name in given if name not in names]
        if problems:
            raise UnknownFieldError(bullet_list(f"{cls.__name__} cannot be made:", problems))
        generated(self, *args, **given)

    cls.__init__ = __init__
    return cls


@_refusing_unknown_fields
@dataclass(frozen=True)
class LoftQConfig(SubConfig):
    """LoftQ, quantisation and low-rank factors fitted to each other (Li et al. 2023, https://arxiv.org/abs/2310.08659).

    loftq_bits   8: int8 by row; 4: NF4; 2: NF2, both in blocks of 64 weights
    loftq_iter   how many times quantisation and factors are fitted in turn, at least 1
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    rules: ClassVar[Mapping[str, Rule]] = {
        "loftq_bits": _one_of(2, 4, 8),
        "loftq_iter": (lambda v: _is_int(v) and v >= 1, "must be an integer of at least 1"),
    }


@_refusing_unknown_fields
@dataclass(frozen=True)
class EvaConfig(SubConfig):
    """EVA, factors from the activations' principal components (Paischer et al. 2024, https://arxiv.org/abs/2410.07170).

    rho               a layer may get up to rho times its rank when ranks are spread anew; 1 spreads nothing
    tau               components count as settled once their cosine similarity to the step before is at least tau
    use_label_mask    look only at tokens that have a label
    label_mask_value  the label that means "no label"
    whiten            divide each component by the square root of its singular value
    adjust_scaling_factors  keep alpha / r of a layer when its rank changes
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    rules: ClassVar[Mapping[str, Rule]] = {
        "rho": (lambda v: _is_number(v) and v >= 1, "must be a finite number of at least 1"),
        "tau": (lambda v: _is_number(v) and 0 <= v <= 1, "must be a number from 0 to 1"),
        "use_label_mask": _FLAG,
        "label_mask_value": (_is_int, "must be an integer"),
        "whiten": _FLAG,
        "adjust_scaling_factors": _FLAG,
    }


@_refusing_unknown_fields
@dataclass(frozen=True)
class CordaConfig(SubConfig):
    """CorDA, factors from weight times input covariance (Yang et al. 2024, https://arxiv.org/abs/2406.05223).

    cache_file        where the factors of every layer are kept, to be found again
    covariance_file   where the covariances are kept, for other ranks
    corda_method      "ipm" trains the components that the data uses most; "kpm" those it uses least, to keep knowledge
    verbose           show progress
    use_float16_for_covariance  half the memory, less exact
    prune_temporary_fields      forget what was measured once the adapter is made
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    rules: ClassVar[Mapping[str, Rule]] = {
        "cache_file": _FILE,
        "covariance_file": _FILE,
        "corda_method": _one_of("ipm", "kpm"),
        "verbose": _FLAG,
        "use_float16_for_covariance": _FLAG,
        "prune_temporary_fields": _FLAG,
    }


@_refusing_unknown_fields
@dataclass(frozen=True)
class LoraGAConfig(SubConfig):
    """LoRA-GA, factors along the weight's own gradient (Wang et al. 2024, https://arxiv.org/abs/2407.05000).

    direction     which of the gradient's 2r leading components A and B get: "ArB2r" A the first r, B the rest;
                  "A2rBr" the other way round; "ArBr" in turn; "random" r of them, the same for both
    scale         "stable" by the fourth root of the outputs; "weight_svd" as large as the weight; "gd_scale" by 1/s;
                  "unit" as they are
    stable_gamma  gamma of "stable"
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16

    rules: ClassVar[Mapping[str, Rule]] = {
        "direction": _one_of("ArBr", "A2rBr", "ArB2r", "random"),
        "scale": _one_of("stable", "weight_svd", "gd_scale", "unit"),
        "stable_gamma": (lambda v: _is_number(v) and v > 0, "must be a positive finite number"),
    }


@_refusing_unknown_fields
@dataclass(frozen=True)
class LoraRuntimeConfig(SubConfig):
    """How adapters are computed here and now; it is never part of an adapter file. There for PEFT's callers.

    ephemeral_gpu_offload   False: heavy one-time work is done where the layer is. A LoraConfig refuses True, which
                            would change nothing
    """

    ephemeral_gpu_offload: bool = False

    rules: ClassVar[Mapping[str, Rule]] = {"ephemeral_gpu_offload": _FLAG}


# By the field of a LoraConfig that holds it.
SUB_CONFIGS: Mapping[str, type[SubConfig]] = {
    "corda_config": CordaConfig,
    "eva_config": EvaConfig,
    "loftq_config": LoftQConfig,
    "lora_ga_config": LoraGAConfig,
    "runtime_config": LoraRuntimeConfig,
}

"""What is wrong with a run's settings, in words: one line a key, with what is allowed or what was meant."""

from collections.abc import Sequence
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from veneer.suggest import did_you_mean
from veneer.train.settings import SECTIONS, RunConfig

MEANT = {  # what other tools and habit call our keys
    "alpha": "lora.lora_alpha",
    "base_model": "model",
    "batch": "training.batch_size",
    "bs": "training.batch_size",
    "dataset": "data.train",
    "dora": "lora.use_dora",
    "dropout": "lora.lora_dropout",
    "epoch": "training.epochs",
    "eval_file": "data.eval",
    "eval_steps": "training.eval_every",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "logging_steps": "training.log_every",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "lr_embedding": "training.loraplus_lr_embedding",
    "lr_ratio": "training.loraplus_lr_ratio",
    "max_seq_length": "training.max_length",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "optim": "training.optimizer",
    "output_dir": "output",
    "per_device_train_batch_size": "training.batch_size",
    "quant": "quantization",
    "quantisation": "quantization",
    "quantize": "quantization",
    "rank": "lora.r",
    "resume_from_checkpoint": "training.resume",
    "rslora": "lora.use_rslora",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep_checkpoints",
    "scheduler": "training.schedule",
    "steps": "training.max_steps",
    "target": "lora.target_modules",
    "targets": "lora.target_modules",
    "train_file": "data.train",
    "train_sampling_strategy": "training.group_by_length",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "wd": "training.weight_decay",
}
SHORTEST_GUESS = 3  # letters; shorter words are like too many others


def in_words(error: ValidationError) -> list[str]:
    """A line for each key that is wrong, in the order of the run file."""
    by_key: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        by_key.setdefault(detail["loc"][: _depth(detail["loc"])], []).append(detail)
    return [line for key, details in by_key.items() for line in _lines(key, details)]


def _depth(place: Sequence[int | str]) -> int:
    """How much of an error's place names a key of the run file; what follows may be the name of a type."""
    return 2 if place and place[0] in SECTIONS else 1


def _lines(key: tuple[int | str, ...], details: list[ErrorDetails]) -> list[str]:
    field = SECTIONS[str(key[0])].model_fields.get(str(key[1])) if len(key) == 2 else None
    if len(details) == 1 or field is None or get_origin(field.annotation) is dict:
        return [_line(detail["loc"], detail) for detail in details]
    below = [detail for detail in details if len(detail["loc"]) > len(key) + 1]
    if not below:  # the value is none of the types that the key may have
        return [f"{_line(key, details[0]).rpartition(', got ')[0]}{_or_else(details[1:])}, got {details[0]['input']!r}"]
    return [_line((*key, below[0]["loc"][-1]), below[0])]  # an item of a list is


def _or_else(details: Sequence[ErrorDetails]) -> str:
    return "".join(f" or {_allowed(detail).removeprefix('should be ')}" for detail in details)


def _line(place: Sequence[int | str], detail: ErrorDetails) -> str:
    """One pydantic error as a line: the key, what is allowed and what was given."""
    keys = [str(key) for key in place]
    name = ".".join(keys) or "run"
    if detail["type"] == "extra_forbidden":
        return f"{name}: unknown key{_meant(keys)}"
    if detail["type"] == "missing":
        return f"{name}: is required"
    if detail["type"] == "value_error":
        return f"{name}: {_allowed(detail)}" if keys else _allowed(detail)
    if detail["type"] == "model_type":
        return f"{name}: must be a section with keys of its own ({', '.join(SECTIONS[name].model_fields)})"
    return f"{name}: {_allowed(detail)}, got {detail['input']!r}"


def _allowed(detail: ErrorDetails) -> str:
    text = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text.partition(", unable to parse")[0]


def _meant(keys: Sequence[str]) -> str:
    """What an unknown key was meant to be: known elsewhere by this name, or else spelt like a known one."""
    section, key = (keys[0] if len(keys) > 1 else ""), keys[-1]
    known: dict[str, Any] = dict((SECTIONS[section] if section else RunConfig).model_fields)
    homes = [f"{name}.{key}" for name, model in SECTIONS.items() if key in model.model_fields]
    homes += [key] if key in RunConfig.model_fields else []
    homes += [MEANT[key.lower()]] if key.lower() in MEANT else []
    if homes:
        return f", did you mean {homes[0].removeprefix(section + '.')!r}?"
    guess = did_you_mean(key, [name for name in known if len(name) >= SHORTEST_GUESS])
    return guess or f" (allowed: {', '.join(known)})"

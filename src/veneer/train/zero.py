"""A run that DeepSpeed's ZeRO steps, as accelerate's environment says, and what such a run cannot do."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import MissingPackageError, RunError

if TYPE_CHECKING:
    from veneer.train.settings import RunConfig

_STAGE, _FILE = "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def in_use() -> bool:
    """Whether DeepSpeed is to step this run, as accelerate's environment says."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def stage() -> int:
    """Which ZeRO that is; 0 without DeepSpeed. Raises RunError if its config file cannot be read."""
    if not in_use():
        return 0
    file = os.environ.get(_FILE, "none")
    if file == "none":
        return int(os.environ.get(_STAGE, "2"))
    return int(_section(_config(Path(file)), "zero_optimization").get("stage", 0))


def refuse(settings: "RunConfig") -> None:
    """Raise before anything is loaded: MissingPackageError without DeepSpeed, RunError for what it cannot do."""
    if not in_use():
        return
    require_deepspeed()
    file = os.environ.get(_FILE, "none")
    own = [name for name in ("optimizer", "scheduler") if file != "none" and name in _config(Path(file))]
    if own:
        raise RunError(f"{file} has a section {own[0]!r}, which run.yaml's training says already: take it out.")
    if settings.training.optimizer == "lorafa":
        raise RunError(
            "training.optimizer=lorafa: DeepSpeed steps all parameters as one row of numbers, and LoRA-FA needs the A "
            "and B of each layer. Take --launch ddp or fsdp2, or another optimizer."
        )
    if stage() == 3 and settings.lora.init_lora_weights == "loftq":
        raise RunError(
            "lora.init_lora_weights=loftq exchanges weights of the base, and ZeRO-3 has cut them into shards. Take "
            "--launch ddp, fsdp2 or deepspeed-zero2, or another start."
        )


def require_deepspeed() -> None:
    """Raise MissingPackageError unless DeepSpeed is installed."""
    if not find_spec("deepspeed"):
        raise MissingPackageError(
            "This profile needs deepspeed, not installed here. Install with: pip install 'veneer[deepspeed]'"
        )


def _config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}, the config file of DeepSpeed, cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise RunError(f"{file}, the config file of DeepSpeed, holds no JSON object.")
    return found


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config[name] if isinstance(config.get(name), dict) else {}

"""A run that DeepSpeed's ZeRO steps, as accelerate's environment says, and what such a run cannot do."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
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
    if stage() == 0:
        raise RunError(
            "This profile has ZeRO stage 0, in which DeepSpeed shards nothing: take --launch ddp, or stage 2."
        )
    if stage() == 3 and settings.dtype == "stored":
        raise RunError("dtype=stored: ZeRO-3 must know the dtype before it reads the weights. Say bfloat16 or float32.")
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


def follow(model: Any) -> None:
    """Make an adapted model ready for ZeRO 3.

    Raises RunError if parameters of several dtypes would be trained: it keeps them in one buffer.
    """
    if stage() < 3:
        return
    from veneer.model.sharded import follow_zero3

    follow_zero3(model)
    if _rounds():
        return
    by_dtype = {str(p.dtype).removeprefix("torch."): name for name, p in model.named_parameters() if p.requires_grad}
    if len(by_dtype) > 1:
        shown = ", ".join(f"{name} is {dtype}" for dtype, name in by_dtype.items())
        raise RunError(
            f"ZeRO-3 trains parameters of one dtype, and {shown}: what modules_to_save trains has the base's dtype, "
            "adapters are float32. Say dtype=float32, or take --launch fsdp2 or deepspeed-zero2."
        )


def _rounds() -> bool:
    """Whether DeepSpeed casts all that it gets to half precision."""
    from transformers.integrations.deepspeed import deepspeed_config

    config: Any = deepspeed_config() or {}
    return any(_section(config, name).get("enabled") is True for name in ("bf16", "fp16"))


@contextmanager
def loading_in(dtype: Any) -> Iterator[None]:
    """Within the block transformers loads weights in this dtype under ZeRO 3 too, which would make them float32.

    A config file of DeepSpeed that says bf16 or fp16 keeps its word; the adapters are in that then.
    """
    import torch
    from transformers.integrations.deepspeed import deepspeed_config

    config: Any = deepspeed_config() if stage() == 3 else None
    if config is None or _rounds():
        yield
        return
    kept = config.get("bf16")
    config["bf16"] = {"enabled": dtype is torch.bfloat16}
    try:
        yield
    finally:
        if kept is None:
            del config["bf16"]
        else:
            config["bf16"] = kept


def make_ready(*, cpu: bool) -> None:
    """Before the processes meet. Raises MissingPackageError without DeepSpeed.

    On CPUs it would compile an operator by which processes of one machine share memory. Training there is for trying
    things out, which should need no compiler.
    """
    require_deepspeed()
    if not cpu:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ops: Any = import_module("deepspeed.ops")
    ops.__compatible_ops__ = {}


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

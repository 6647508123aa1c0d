"""Settings of a run on the tiny model, and a progress display that remembers."""

from pathlib import Path

from veneer.train.progress import Progress
from veneer.train.settings import RunConfig

WEIGHTS = "adapter_model.safetensors"


class Told(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, step) -> None:
        self.steps.append(step.step)


def settings(model_dir: Path, rows: Path, output: Path, *, lora: dict | None = None, **changes) -> RunConfig:
    training = {"epochs": None, "max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "warmup": 0}
    top = {key: changes.pop(key) for key in ("overwrite",) if key in changes}
    data = {"train": str(rows), **changes.pop("data", {})}
    return RunConfig.model_validate(
        {
            "model": str(model_dir),
            "data": data,
            "output": str(output),
            "lora": {"r": 4, **(lora or {})},
            "training": training | changes,
            **top,
        }
    )

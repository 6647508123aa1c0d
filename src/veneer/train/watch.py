"""Trainer callbacks: the log file and the progress display; and the error for what is no number."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.errors import RunError
from veneer.train.progress import Progress, Step
from veneer.train.resume import complete_checkpoints, step_of


@dataclass
class Meter:
    """Tokens read so far by all processes, and the time since the first of them was."""

    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since training began."""
        return time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        """Tokens read in a second, padding not counted."""
        return self.tokens / max(self.seconds, 1e-9)


def not_finite(what: str, step: int, checkpoints: Path) -> RunError:
    """The error for a loss or gradient that is NaN or infinite in the given step."""
    kept = complete_checkpoints(checkpoints)
    return RunError(
        f"The {what} is not a finite number at step {step}, so training stopped; no adapter was written.\n"
        f"  Try a smaller training.learning_rate, a smaller training.max_grad_norm or dtype=float32."
        + (f"\n  The adapter of step {step_of(kept[-1])} is kept: {kept[-1]}" if kept else "")
    )


class LastStep(TrainerCallback):
    """Logs the last step, and evaluates after it, whatever training.log_every and eval_every are."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Follow this run's settings: a checkpoint brings those of the run that wrote it."""
        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)
        state.eval_steps = int(args.eval_steps or args.logging_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Ask for both at the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS


class LogFile(TrainerCallback):
    """Appends one JSON object a line: step, epoch, loss, learning_rate, grad_norm, tokens_per_second, seconds.

    The first process alone writes.
    """

    def __init__(self, path: Path, meter: Meter):
        self.path, self.meter = path, meter

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        """Write a training or evaluation loss; the summary at the end is not a step."""
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        speed = {"tokens_per_second": round(self.meter.tokens_per_second, 1), "seconds": round(self.meter.seconds, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs, **speed}) + "\n")


class Show(TrainerCallback):
    """Hands each step to the progress display."""

    def __init__(self, progress: Progress, meter: Meter):
        self.progress, self.meter = progress, meter
        self.loss: float | None = None
        self.first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Start the clock."""
        self.meter.started, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Show a step whose loss is not logged."""
        if not control.should_log:
            self._show(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        """Show a step with its loss."""
        if logs and "loss" in logs:
            self.loss = logs["loss"]
            self._show(state)

    def _show(self, state: TrainerState) -> None:
        done = state.global_step - self.first
        left = (state.max_steps - state.global_step) * self.meter.seconds / max(done, 1)
        self.progress.step(
            Step(state.global_step, state.max_steps, self.loss, self.meter.tokens_per_second, left, memory_in_use())
        )


def memory_in_use() -> int:
    """Bytes this process holds: on the accelerator the most it ever did, else what is resident now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss

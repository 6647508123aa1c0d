"""A run file's settings to an adapter folder.

OUTPUT/adapter/       the result: adapter_config.json, adapter_model.safetensors and the tokenizer
OUTPUT/log.jsonl      loss, learning rate, gradient norm and speed, one line a step
OUTPUT/loss.png       where matplotlib is installed
OUTPUT/run.yaml       the settings, defaults written out
OUTPUT/checkpoints/   where training.save_every asks for them
"""

import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import RunError
from veneer.storage.write import write_file, write_folder
from veneer.train.data import Row, read_rows
from veneer.train.folders import is_empty, refuse_non_empty
from veneer.train.load import load_model, load_tokenizer
from veneer.train.packages import has, require
from veneer.train.progress import Progress
from veneer.train.quiet import quiet
from veneer.train.settings import RunConfig
from veneer.train.tokens import Tokens, stop_ids, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.sft_config import SFTConfig

    from veneer.train.trainer import VeneerSFTTrainer
    from veneer.train.watch import Meter

CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@dataclass(frozen=True, slots=True)
class Result:
    """What a run made. losses and eval_losses are (step, loss per token); seconds are those of the training alone."""

    adapter_dir: Path
    log_file: Path
    plot: Path | None
    losses: list[tuple[int, float]]
    eval_losses: list[tuple[int, float]]
    steps: int
    seconds: float
    tokens: int
    trainable: int
    total: int


def train(settings: RunConfig, *, progress: Progress | None = None) -> Result:
    """Train an adapter as the settings say and write OUTPUT/adapter.

    The adapter folder appears complete or not at all; one that is there stays until a new one is finished.
    Raises RunError (settings, model or output folder, or a loss that is no longer a number), DataError (rows),
    ConfigError and TargetError (the adapter).
    """
    require("train")
    progress = progress or Progress()
    output = Path(settings.output).expanduser()
    checkpoint = _prepare_output(output, settings)
    rows, eval_rows = _split(read_rows(Path(settings.data.train)), settings)
    with quiet():
        tokenizer = load_tokenizer(settings.model, revision=settings.revision)
        model = load_model(settings.model, revision=settings.revision, dtype=settings.dtype)
        stops = stop_ids(model, tokenizer)
        data, eval_data = (
            tokenise(
                part, tokenizer, stops=stops, max_length=settings.training.max_length, too_long=settings.data.too_long
            )
            for part in (rows, eval_rows)
        )
        for note in [*data.notes(), *eval_data.notes()]:
            progress.say(f"Note: {note}")
        trainable, total = _attach(model, settings)
        progress.say(
            f"{len(data.examples)} rows, {data.total:,} tokens of which {data.learned:,} are learned; "
            f"{trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)"
        )
        return _fit(model, tokenizer, data, eval_data, settings, checkpoint, progress, (trainable, total))


def _prepare_output(output: Path, settings: RunConfig) -> Path | None:
    """The checkpoint to resume from, or None; RunError if something in the way would be lost."""
    if settings.training.resume:
        return newest_checkpoint(output / "checkpoints")
    if not settings.overwrite:
        refuse_non_empty(
            output,
            hint="Say overwrite=true to start anew, training.resume=true to go on, or output=… for another folder.",
        )
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    (output / "log.jsonl").unlink(missing_ok=True)
    return None


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint with the highest step that was written to its end; RunError if there is none."""
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in numbered:
        if all((path / name).is_file() for name in CHECKPOINT_FILES) and _is_json(path / "trainer_state.json"):
            return path
    found = f"{len(numbered)} checkpoints, none complete" if numbered else "no checkpoint"
    raise RunError(f"training.resume=true found {found} in {folder}. Set training.save_every, or start without resume.")


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _split(rows: list[Row], settings: RunConfig) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows: from two files, or a share drawn with the seed."""
    if settings.data.eval is not None:
        return rows, read_rows(Path(settings.data.eval))
    count = round(len(rows) * settings.data.eval_fraction)
    if settings.data.eval_fraction and not 0 < count < len(rows):
        raise RunError(f"data.eval_fraction={settings.data.eval_fraction} of {len(rows)} rows leaves one part empty.")
    chosen = set(random.Random(settings.training.seed).sample(range(len(rows)), count))
    return [row for at, row in enumerate(rows) if at not in chosen], [rows[at] for at in sorted(chosen)]


def _attach(model: "PreTrainedModel", settings: RunConfig) -> tuple[int, int]:
    """Attach the adapter; the number of parameters that are trained, and of all."""
    import torch

    from veneer.integrations.transformers import add_adapter

    generator = torch.Generator().manual_seed(settings.training.seed)
    add_adapter(model, settings.lora.config(), generator=generator)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def _fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: Tokens,
    eval_data: Tokens,
    settings: RunConfig,
    checkpoint: Path | None,
    progress: Progress,
    counts: tuple[int, int],
) -> Result:
    from veneer.train.watch import Meter

    output = Path(settings.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    _write_settings(settings, output / "run.yaml")
    meter = Meter()
    trainer = _trainer(model, tokenizer, data, eval_data, settings, progress, meter)
    begun = time.monotonic()
    if checkpoint:
        progress.say(f"Going on from {checkpoint}")
    with progress.bar("Training"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - begun
    history = trainer.state.log_history
    losses = [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]
    eval_losses = [(int(entry["step"]), entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    adapter_dir = _save(model, tokenizer, output)
    if is_empty(output / "checkpoints"):
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return Result(
        adapter_dir=adapter_dir,
        log_file=output / "log.jsonl",
        plot=_plot(losses, eval_losses, output / "loss.png", progress),
        losses=losses,
        eval_losses=eval_losses,
        steps=trainer.state.global_step,
        seconds=seconds,
        tokens=meter.tokens,
        trainable=counts[0],
        total=counts[1],
    )


def _trainer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: Tokens,
    eval_data: Tokens,
    settings: RunConfig,
    progress: Progress,
    meter: "Meter",
) -> "VeneerSFTTrainer":
    from transformers import PrinterCallback

    from veneer.train.load import device
    from veneer.train.trainer import VeneerSFTTrainer
    from veneer.train.watch import FiniteGradients, LogFile, Show

    output = Path(settings.output).expanduser()
    trainer = VeneerSFTTrainer(
        model=model,
        args=_arguments(settings, output / "checkpoints", evaluates=bool(eval_data.examples)),
        train_dataset=_dataset(data),
        eval_dataset=_dataset(eval_data) if eval_data.examples else None,
        processing_class=tokenizer,
        callbacks=[FiniteGradients(), LogFile(output / "log.jsonl", meter), Show(progress, meter)],
        meter=meter,
        through_head=device().type == "cpu" or _head_is_trained(model),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _head_is_trained(model: "PreTrainedModel") -> bool:
    head: Any = model.get_output_embeddings()
    return head is not None and any(parameter.requires_grad for parameter in head.parameters())


def _dataset(tokens: Tokens) -> Any:
    from datasets import Dataset

    columns = {
        "input_ids": [example.input_ids for example in tokens.examples],
        "labels": [example.labels for example in tokens.examples],
    }
    return Dataset.from_dict(columns)


def _arguments(settings: RunConfig, folder: Path, *, evaluates: bool) -> "SFTConfig":
    """TRL's arguments. Rows come tokenised and cut, so max_length is given only where it is the size of a pack."""
    import torch
    from trl.trainer.sft_config import SFTConfig

    run = settings.training
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=run.epochs or 1,
        max_steps=run.max_steps or -1,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.schedule,
        warmup_steps=run.warmup,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        max_length=run.max_length if run.packing else None,
        packing=run.packing,
        activation_checkpointing=run.gradient_checkpointing,
        seed=run.seed,
        logging_steps=run.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy=("steps" if run.eval_every else "epoch") if evaluates else "no",
        eval_steps=run.eval_every,
        prediction_loss_only=True,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 500,
        save_total_limit=run.keep_checkpoints,
        bf16=False,  # the model is loaded in its dtype already; autocast on top would only slow it
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", output: Path) -> Path:
    """Write the adapter and its tokenizer, once all its numbers are known to be finite."""
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise RunError(f"{len(broken)} trained tensors hold numbers that are not finite, first {broken[0]}: not saved.")

    def fill(stage: Path) -> None:
        model.save_pretrained(str(stage))
        tokenizer.save_pretrained(str(stage))

    write_folder(output / "adapter", fill)
    return output / "adapter"


def _write_settings(settings: RunConfig, path: Path) -> None:
    import yaml

    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_file(path, text.encode())


def _plot(
    losses: Sequence[tuple[int, float]], eval_losses: Sequence[tuple[int, float]], path: Path, progress: Progress
) -> Path | None:
    from veneer.train.plot import plot_losses

    if not has("plot"):
        progress.say("Note: no loss.png, as matplotlib is not installed: pip install 'veneer[plot]'")
        return None
    plot_losses(losses, path, eval_losses=eval_losses)
    return path

"""A run file's settings to an adapter folder.

OUTPUT/adapter/       the result: adapter_config.json, adapter_model.safetensors, the tokenizer and a model card
OUTPUT/log.jsonl      loss, learning rate, gradient norm and speed, one line a step
OUTPUT/loss.png       where matplotlib is installed
OUTPUT/run.yaml       the settings, defaults written out
OUTPUT/data.json      how many rows the data files held, and their checksums
OUTPUT/checkpoints/   where training.save_every asks for them
"""

import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import RunError
from veneer.model.precision import prepare_model_for_kbit_training
from veneer.train import freed_memory, zero
from veneer.train.build import arguments, build_trainer
from veneer.train.card import training_section
from veneer.train.finish import plot, save
from veneer.train.folders import is_empty, refuse_non_empty, refuse_unwritable
from veneer.train.gathered import adapter_state, trained
from veneer.train.load import load_model, load_tokenizer, torch_dtype
from veneer.train.packages import require
from veneer.train.progress import Progress
from veneer.train.quantisation import WAYS, refuse_unusable
from veneer.train.quiet import quiet
from veneer.train.ranks import Ranks, each_loads_all, join, lost_another
from veneer.train.resume import (
    CHECKPOINTS,
    LOG_FILE,
    Fingerprint,
    Stopped,
    fingerprint,
    newest_checkpoint,
    note_attempt,
    processes_of,
    refuse_changes,
    started_again,
    step_of,
    trim_log,
    what_is_kept,
    write_record,
)
from veneer.train.sets import Sets, read_sets, tokenise_sets
from veneer.train.settings import RunConfig
from veneer.train.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.sft_config import SFTConfig

    from veneer.train.trainer import VeneerSFTTrainer


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

    Nothing is written or deleted before the rows, the model and the adapter are known to fit. The adapter folder
    appears complete or not at all; one that is there stays until a new one is finished.

    Where torchrun starts the processes again (`--max-restarts`), the run goes on from its newest checkpoint.

    In each process of a run of several (torchrun, accelerate) it is called with the same settings; the first alone
    shows progress and writes. What is wrong in one of them ends all.

    Raises RunError (settings, model or output folder, or a loss that is no longer a number), DataError (rows),
    ConfigError and TargetError (the adapter), MissingPackageError (a quantisation's), and Stopped, a KeyboardInterrupt
    that says what was kept.
    """
    require("train")
    ranks = join()
    progress = progress if progress and ranks.is_first else Progress()
    settings = ranks.first_does(lambda: started_again(settings)).applied_to(settings)
    output = Path(settings.output).expanduser()
    ranks.agree(lambda: _refuse_what_cannot_be(settings))
    checkpoint = ranks.first_does(lambda: _check_output(output, settings))
    sets, record = ranks.agree(lambda: _read(settings))
    ranks.must_equal({name: part["sha256"] for name, part in record.items()}, "The data files")
    if checkpoint:
        ranks.agree(lambda: _refuse_other_run(output, settings, record, checkpoint, ranks))
    with quiet():
        each_loads_all(settings.lora.init_lora_weights)
        args = arguments(settings, output / CHECKPOINTS, evaluates=bool(sets.eval))
        parts = ranks.agree(lambda: _prepare(settings, sets, progress))
        return _fit(*parts, settings, args, record, checkpoint, progress, ranks)


def _refuse_what_cannot_be(settings: RunConfig) -> None:
    zero.refuse(settings)
    refuse_unusable(settings.quantization)


def _read(settings: RunConfig) -> tuple[Sets, Fingerprint]:
    sets = read_sets(settings)
    return sets, fingerprint(settings, sets.counts)


def _refuse_other_run(output: Path, settings: RunConfig, record: Fingerprint, checkpoint: Path, ranks: Ranks) -> None:
    """Raise RunError if the checkpoint is not one of this run, or not to be seen from here."""
    if not checkpoint.is_dir():
        raise RunError(f"{checkpoint} is not here: to go on, all machines must share the output folder.")
    before = processes_of(checkpoint)
    refuse_changes(output, settings, record, processes_before=before, processes=ranks.count)


def _prepare(
    settings: RunConfig, sets: Sets, progress: Progress
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", tuple[Tokens, Tokens]]:
    """The adapted model, its tokenizer and the rows as tokens."""
    tokenizer = load_tokenizer(settings.model, revision=settings.revision)
    with zero.loading_in(torch_dtype(settings.dtype)):
        model = load_model(
            settings.model, revision=settings.revision, dtype=settings.dtype, quantization=settings.quantization
        )
    data, eval_data = tokenise_sets(sets, model, tokenizer, settings)
    for note in [*data.notes(), *eval_data.notes()]:
        progress.say(f"Note: {note}")
    if getattr(model.config, "quantization_config", None) is not None:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # training.gradient_checkpointing does
    _attach(model, settings)
    zero.follow(model)
    trainable, total = _counts(model)
    if settings.quantization:
        progress.say(f"The base is kept in {WAYS[settings.quantization].says}")
    progress.say(
        f"{len(data.examples)} rows, {data.total:,} tokens of which {data.learned:,} are learned; "
        f"{trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)"
    )
    return model, tokenizer, (data, eval_data)


def _check_output(output: Path, settings: RunConfig) -> Path | None:
    """The checkpoint to go on from, or None; RunError if the folder cannot be made or holds what would be lost."""
    refuse_unwritable(output)
    if settings.training.resume:
        checkpoint = newest_checkpoint(output / CHECKPOINTS)
        if settings.training.max_steps is not None and step_of(checkpoint) > settings.training.max_steps:
            raise RunError(f"{checkpoint} is past training.max_steps={settings.training.max_steps}.")
        return checkpoint
    if not settings.overwrite:
        refuse_non_empty(
            output,
            hint="Say overwrite=true to start anew, training.resume=true to go on, or output=… for another folder.",
        )
    return None


def _attach(model: "PreTrainedModel", settings: RunConfig) -> None:
    import torch

    from veneer.integrations.transformers import add_adapter
    from veneer.optimizers.lorafa import freeze_A

    generator = torch.Generator().manual_seed(settings.training.seed)
    add_adapter(model, settings.lora.config(), generator=generator)
    if settings.training.optimizer == "lorafa":
        freeze_A(model)  # its optimizer would do so later; what trains is counted before


def _counts(model: "PreTrainedModel") -> tuple[int, int]:
    """The number of parameters that are trained, and of all; those of packed weights each by itself."""
    from veneer.model.report import count_parameters

    return count_parameters(model)


def _fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: tuple[Tokens, Tokens],
    settings: RunConfig,
    args: "SFTConfig",
    record: Fingerprint,
    checkpoint: Path | None,
    progress: Progress,
    ranks: Ranks,
) -> Result:
    from veneer.train.out_of_memory import is_out_of_memory, model_too_large
    from veneer.train.watch import Meter

    output = Path(settings.output).expanduser()
    log_file = output / LOG_FILE
    meter = Meter()
    counts = _counts(model)  # while the model is whole
    try:  # this moves the model to the accelerator
        trainer = build_trainer(
            model, tokenizer, *data, settings, args, log_file=log_file, progress=progress, meter=meter
        )
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise model_too_large(settings.model, error) from None
        raise
    before = trained(model)
    ranks.first_does(lambda: _make_room(output, checkpoint, settings, record))
    begun = time.monotonic()
    if checkpoint:
        progress.say(f"Going on from {checkpoint}")
    _run(trainer, settings, checkpoint, progress, ranks)
    seconds = time.monotonic() - begun
    history = trainer.state.log_history
    losses = [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]
    eval_losses = [(int(entry["step"]), entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    trainable, total = counts
    said = training_section(
        settings,
        record,
        losses,
        eval_losses,
        steps=trainer.state.global_step,
        tokens=meter.tokens,
        seconds=seconds,
        dtype=_precision(model, settings),
        processes=ranks.count,
    )
    after, state = trained(model), adapter_state(model)  # all gather what only the first writes
    return Result(
        adapter_dir=ranks.first_does(lambda: save(model, tokenizer, output, before, after, state, said)),
        log_file=log_file,
        plot=ranks.first_does(lambda: plot(losses, eval_losses, output / "loss.png", progress)),
        losses=losses,
        eval_losses=eval_losses,
        steps=trainer.state.global_step,
        seconds=seconds,
        tokens=meter.tokens,
        trainable=trainable,
        total=total,
    )


def _precision(model: "PreTrainedModel", settings: RunConfig) -> str:
    """In what the base was kept, for the card."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{WAYS[settings.quantization].says} (`{settings.quantization}`)" if settings.quantization else dtype


def _make_room(output: Path, checkpoint: Path | None, settings: RunConfig, record: Fingerprint) -> None:
    """Remove what an earlier run left that this one does not go on with, and note what this one is."""
    if checkpoint:
        trim_log(output / LOG_FILE, step_of(checkpoint))
    else:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        (output / LOG_FILE).unlink(missing_ok=True)
    write_record(output, settings, record)
    note_attempt(output)


def _run(
    trainer: "VeneerSFTTrainer", settings: RunConfig, checkpoint: Path | None, progress: Progress, ranks: Ranks
) -> None:
    """Train. Stopped, with what was kept, if the user interrupts; RunError, with what would need less, if memory runs
    out. No empty checkpoint folder stays behind.
    """
    from veneer.train.out_of_memory import explained, is_out_of_memory, room_on

    checkpoints = Path(settings.output).expanduser() / CHECKPOINTS
    try:
        on_cpu = trainer.args.device.type == "cpu"
        with progress.bar("Training"), freed_memory.kept() if on_cpu else nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        state = trainer.state
        where = f"Stopped at step {state.global_step}/{state.max_steps}." if state.max_steps else "Stopped."
        raise Stopped(f"{where} {what_is_kept(settings)}") from None
    except (RuntimeError, MemoryError) as error:
        if ranks.count > 1 and lost_another(error):
            raise RunError(f"Another process of this run ended without a word. {what_is_kept(settings)}") from error
        if not is_out_of_memory(error):
            raise
        model: Any = trainer.model
        state = trainer.state
        raise explained(
            error,
            settings,
            trainer.doing,
            step=state.global_step + 1,
            steps=state.max_steps,
            dtype=model.dtype,
            trained=_counts(model)[0],
            room=room_on(trainer.args.device, model),
        ) from None
    finally:
        if ranks.is_first and is_empty(checkpoints):
            shutil.rmtree(checkpoints, ignore_errors=True)

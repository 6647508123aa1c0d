"""The trainer of a run: its arguments, its data sets and its callbacks, from the settings."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train import zero
from veneer.train.optimizer import optimizer_for
from veneer.train.progress import Progress
from veneer.train.ranks import backend, number, on_cpu, shards_model
from veneer.train.settings import RunConfig
from veneer.train.tokens import IGNORED, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.sft_config import SFTConfig

    from veneer.train.trainer import VeneerSFTTrainer
    from veneer.train.watch import Meter


def build_trainer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: Tokens,
    eval_data: Tokens,
    settings: RunConfig,
    args: "SFTConfig",
    *,
    log_file: Path,
    progress: Progress,
    meter: "Meter",
) -> "VeneerSFTTrainer":
    """A trainer that trains what is trainable in `model`, logs each step and shows it. args: of `arguments`.

    Raises what `optimizer_for` raises.
    """
    from transformers import PrinterCallback

    from veneer.train.loss import plain_head
    from veneer.train.trainer import VeneerSFTTrainer
    from veneer.train.watch import LastStep, LogFile, Show

    adamw = VeneerSFTTrainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = optimizer_for(model, settings, adamw=adamw)  # before the trainer makes the folder of checkpoints
    at_once = args.per_device_train_batch_size * args.world_size
    fillers, eval_fillers = (
        (-len(part.examples)) % at_once if args.world_size > 1 else 0 for part in (data, eval_data)
    )
    fillers = 0 if settings.training.packing else fillers
    values = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    trainer = VeneerSFTTrainer(
        model=model,
        args=args,
        train_dataset=_dataset(data, fillers),
        eval_dataset=_dataset(eval_data, eval_fillers) if eval_data.examples else None,
        processing_class=tokenizer,
        callbacks=[LastStep(), LogFile(log_file, meter), Show(progress, meter)],
        meter=meter,
        schedule=settings.training.schedule,
        warmup=settings.training.warmup,
        group_by_length=settings.training.group_by_length and not settings.training.packing,
        fillers=(fillers, eval_fillers),
    )
    _undo_casts(model, values)
    # now that the model is where it will run; under ZeRO 3 it is nowhere as a whole
    trainer.head = plain_head(model) if shards_model() != "ZeRO-3" else None
    if trainer.head is None:
        progress.say(
            "Note: the loss is taken from the logits that the model computes, as its output head is adapted or "
            "trained, or its logits are more than the head's output. That takes more memory, and somewhat longer."
        )
    trainer.own_optimizer = trainer.optimizer = optimizer  # None: the trainer makes its own
    trainer.remove_callback(PrinterCallback)
    return trainer


def _undo_casts(model: "PreTrainedModel", values: dict[str, Any]) -> None:
    """Keep what is trained in its dtype: TRL rounds it to bfloat16 over a quantised base, too coarse a grid."""
    for name, parameter in model.named_parameters():
        if name in values and parameter.dtype != values[name].dtype:
            parameter.data = values[name].to(parameter.device)


def _dataset(tokens: Tokens, fillers: int) -> Any:
    """The examples, and behind them so many of which nothing is learned.

    Processes step together, so each needs as many batches of as many rows; accelerate would repeat rows, and a run on
    two devices would not be that on one.
    """
    from datasets import Dataset

    shortest = min((example.input_ids for example in tokens.examples), key=len)
    columns = {
        "input_ids": [example.input_ids for example in tokens.examples] + [shortest] * fillers,
        "labels": [example.labels for example in tokens.examples] + [[IGNORED] * len(shortest)] * fillers,
    }
    return Dataset.from_dict(columns)


def arguments(settings: RunConfig, folder: Path, *, evaluates: bool) -> "SFTConfig":
    """TRL's arguments, checkpoints in `folder`. Made before the model is loaded, which ZeRO 3 shards meanwhile.

    Rows come tokenised and cut, so max_length is given only where it is the size of a pack. The learning rate's
    schedule is ours, see schedule.py.
    """
    import torch
    from trl.trainer.sft_config import SFTConfig

    run, lora = settings.training, settings.lora
    recomputes = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true"  # FSDP does it itself
    return SFTConfig(
        output_dir=str(folder),
        # else accelerate sees no processes where there is no accelerator; with it, it would see no DeepSpeed
        use_cpu=number() > 1 and on_cpu() and not zero.in_use(),
        ddp_backend=backend() if zero.in_use() else None,
        num_train_epochs=run.epochs or 1,
        max_steps=run.max_steps or -1,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        max_length=run.max_length if run.packing else None,
        packing=run.packing,
        activation_checkpointing=run.gradient_checkpointing and not (recomputes and shards_model() == "FSDP"),
        # what a batch may leave out on one device, where the others wait for its gradient
        ddp_find_unused_parameters=bool(lora.modules_to_save or lora.alora_invocation_tokens),
        ddp_broadcast_buffers=False,
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

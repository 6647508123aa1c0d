"""The optimizer a run asks for: Trainer's own AdamW, or one that tells A from B."""

from typing import TYPE_CHECKING, Any

from veneer.errors import RunError
from veneer.train.settings import RunConfig

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

LR_RATIO = 16  # what the paper of LoRA+ finds a good choice


def optimizer_for(
    model: "nn.Module", settings: RunConfig, *, adamw: tuple[type["Optimizer"], dict[str, Any]]
) -> "Optimizer | None":
    """What training.optimizer names, or None for the trainer's own; `adamw` is its class and arguments.

    LoRA+ is that class with other groups. Raises RunError for a setting with no effect, and ConfigError where LoRA-FA
    would leave an adapter with nothing to learn.
    """
    run = settings.training
    if run.optimizer == "loraplus":
        return _loraplus(model, settings, adamw)
    if run.optimizer == "lorafa":
        from veneer.optimizers import create_lorafa_optimizer

        lora = settings.lora
        return create_lorafa_optimizer(
            model, lora.r, lora.lora_alpha, run.learning_rate, run.weight_decay, lora.use_rslora
        )
    return None


def _loraplus(model: "nn.Module", settings: RunConfig, adamw: tuple[type["Optimizer"], dict[str, Any]]) -> "Optimizer":
    from veneer.optimizers import create_loraplus_optimizer
    from veneer.optimizers.trained import adapters_in_training

    run, (cls, arguments) = settings.training, adamw
    if run.loraplus_lr_embedding is not None:
        if not any(adapter.kind.name == "embedding" for adapter in adapters_in_training(model).values()):
            raise RunError(
                "training.loraplus_lr_embedding has no effect: no adapter lies on an embedding. "
                "Leave it out, or name the embedding in lora.target_modules."
            )
        arguments = {**arguments, "loraplus_lr_embedding": run.loraplus_lr_embedding}
    return create_loraplus_optimizer(
        model,
        cls,
        loraplus_lr_ratio=run.loraplus_lr_ratio or LR_RATIO,
        loraplus_weight_decay=run.weight_decay,
        **arguments,
    )

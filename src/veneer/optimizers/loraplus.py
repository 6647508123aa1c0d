"""LoRA+: B learns faster than A, by a fixed ratio (Hayou et al. 2024, https://arxiv.org/abs/2402.12354)."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from veneer.errors import ConfigError, VeneerWarning
from veneer.optimizers.trained import adapters_in_training, check_numbers, without_decay


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer of class `optimizer_cls` over what trains in the model, in four groups, some of them maybe empty.

        group         learning rate            holds
        A             lr                       every lora_A, and the weights of modules trained in full
        embedding     loraplus_lr_embedding    both factors of the adapters on embeddings
        B             lr * loraplus_lr_ratio   every lora_B and DoRA magnitude
        B, no decay   lr * loraplus_lr_ratio   biases, and the weights of norms trained in full

    loraplus_lr_ratio  how many times faster B learns; the paper finds 16 a good choice, with a somewhat lower lr
    kwargs             go to `optimizer_cls`

    State is what `optimizer_cls` keeps, in its dtypes. Raises ConfigError for a number that cannot be right, and
    AdapterNameError if the model has no adapter that trains.
    """
    check_numbers(
        {"lr": lr, "loraplus_lr_embedding": loraplus_lr_embedding, "loraplus_weight_decay": loraplus_weight_decay},
        above_zero={"loraplus_lr_ratio": loraplus_lr_ratio},
    )
    if not callable(optimizer_cls) or isinstance(optimizer_cls, nn.Module | Optimizer):
        given = type(optimizer_cls).__name__
        raise ConfigError(f"optimizer_cls must be a class of optimizers such as torch.optim.AdamW, not a {given}.")
    if "weight_decay" in kwargs:
        raise ConfigError("weight_decay would have no effect: each group has its own. Say loraplus_weight_decay.")
    if loraplus_lr_ratio < 1:
        warnings.warn(
            f"loraplus_lr_ratio={loraplus_lr_ratio:g} lets B learn slower than A; LoRA+ is the other way round.",
            VeneerWarning,
            stacklevel=2,
        )
    groups = _groups(model)
    fast, decay = lr * loraplus_lr_ratio, loraplus_weight_decay
    optimizer = optimizer_cls(
        [
            {"params": groups["A"], "lr": lr, "weight_decay": decay},
            {"params": groups["embedding"], "lr": loraplus_lr_embedding, "weight_decay": decay},
            {"params": groups["B"], "lr": fast, "weight_decay": decay},
            {"params": groups["B, no decay"], "lr": fast, "weight_decay": 0.0},
        ],
        lr=lr,
        **kwargs,
    )
    if type(optimizer).__module__.startswith("bitsandbytes"):
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What trains, by group, each in the model's order."""
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B, no decay": []}
    role: dict[int, str] = {}
    for adapter in adapters_in_training(model).values():
        of_A, of_B = ("embedding", "embedding") if adapter.kind.name == "embedding" else ("A", "B")
        role |= {id(adapter.lora_A): of_A, id(adapter.lora_B): of_B}
    undecayed = without_decay(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            beside = "A" if parameter.ndim > 1 else "B, no decay" if id(parameter) in undecayed else "B"
            groups[role.get(id(parameter), beside)].append(parameter)
    return groups


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Tell bitsandbytes, whose 8-bit state is too coarse for an embedding trained in full."""
    from bitsandbytes.optim import GlobalOptimManager  # type: ignore[import-not-found]

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})

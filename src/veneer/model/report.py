"""Counts a user asks for."""

from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers in the model's parameters; shared ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def trainable_line(model: nn.Module) -> str:
    """One line about how much of the model is trained."""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"

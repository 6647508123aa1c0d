"""Counts a user asks for."""

from torch import nn

from veneer.layers.sharded import size_of

PACKED = ("Params4bit",)  # 4-bit weights, whose container may have a half-precision dtype


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers in the model's parameters; shared ones count once, packed ones each."""
    parameters = list(model.parameters())
    return sum(size_of(p) for p in parameters if p.requires_grad), sum(numbers_in(p) for p in parameters)


def numbers_in(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds; a packed one has two in a byte."""
    if type(parameter).__name__ in PACKED and parameter.bnb_quantized:  # type: ignore[attr-defined]
        return 2 * parameter.numel() * parameter.element_size()  # two in a byte, whatever holds the bytes
    return size_of(parameter)


def trainable_line(model: nn.Module) -> str:
    """One line about how much of the model is trained."""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"

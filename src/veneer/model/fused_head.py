"""An output head whose weight is read and never called.

TRL's losses multiply the hidden states by `model.get_output_embeddings().weight` themselves, in a forward of their own
that is called with `fused_lm_head=True`. A head that an adapter trains in full, or of which it trains rows, has its
weight elsewhere: for the length of such a call the model answers with that one.
V vocabulary, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.errors import AttachError
from veneer.layers.attach import Adapted
from veneer.layers.route import Step
from veneer.layers.saved_module import Saved, acting_copy
from veneer.layers.token_rows import WithRows

_HEAD = "get_output_embeddings"
_CALL = "fused_lm_head"


@dataclass(frozen=True)
class ReadHead:
    """The weight (V, D) and bias (V,) or None of an output head, to be read; it is no module."""

    weight: Tensor
    bias: Tensor | None


@contextmanager
def readable_head(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, which is one call of forward with these arguments, the head's weight is the one that acts.

    Raises AttachError if the head has no one weight: LoRA acts on it, or adapters serve parts of the batch.
    """
    head = getattr(model, _HEAD)() if kwargs.get(_CALL) and hasattr(model, _HEAD) else None
    acting = None if head is None else _acting(head)
    if acting is None or acting is head:
        yield
        return
    outside = vars(model).get(_HEAD)
    vars(model)[_HEAD] = lambda: acting
    try:
        yield
    finally:
        vars(model).pop(_HEAD, None)
        if outside is not None:
            vars(model)[_HEAD] = outside


def _acting(head: nn.Module) -> nn.Module | ReadHead:
    """What has the weight that acts: the head itself, an adapter's copy of it, or what its rows make of it."""
    if isinstance(head, Saved):
        _refuse_parts(
            [step for step in head._veneer_route.plan if step.part is not None and step.part.rows is not None]
        )
        copy = acting_copy(head)
        return head if copy is None else copy
    if isinstance(head, WithRows):
        steps = [step for step in head._veneer_route.plan if step.name in head.token_rows]
        _refuse_parts([step for step in steps if step.part is not None])
        weight: Any = head.weight
        for step in steps:
            weight = head.token_rows[step.name].merged(weight)
        return ReadHead(weight, head.bias) if steps else head  # type: ignore[arg-type]
    if isinstance(head, Adapted) and any(step.name in head.adapters for step in head._veneer_route.plan):
        raise AttachError(
            "TRL multiplies by lm_head.weight itself, so an adapter on the output head would never be trained: leave "
            "lm_head out of target_modules, or name it in modules_to_save."
        )
    return head


def _refuse_parts(steps: list[Step]) -> None:
    if steps:
        raise AttachError(
            "This loss multiplies by one weight of the output head for the whole batch, so adapters cannot serve some "
            "of its rows or tokens only. Choose one without alora_invocation_tokens with set_adapter."
        )

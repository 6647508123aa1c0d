"""What it costs to merge into a quantised base: weights that are rounded again, and what the model then answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ArgumentError, MergeError, bullet_list
from veneer.layers.weights import Loss, is_quantised
from veneer.model.merge import Losses, merge, unmerge
from veneer.model.overlay import adapters_by_site, overlay_needed

_SHOWN = 3


@dataclass(frozen=True)
class RequantizationReport:
    """How far a merged and rounded model is from the one with adapters.

    layers  what rounding lost of each weight, by the layer's path
    kl      the mean over sample tokens of KL(with adapters ‖ merged) of the next token, in nats; None without a sample
    top1    the share of sample tokens after which both think the same token likeliest; None without a sample
    tokens  how many there were
    """

    layers: Mapping[str, Loss] = field(repr=False)
    kl: float | None = None
    top1: float | None = None
    tokens: int = 0

    @property
    def total(self) -> Loss:
        """The sum over all layers."""
        return sum(self.layers.values(), Loss())

    @property
    def relative(self) -> float:
        """‖rounded − wanted‖ / ‖wanted‖ over all these weights."""
        return self.total.relative

    @property
    def of_update(self) -> float:
        """‖rounded − wanted‖ / ‖update‖ over all these weights: above 1, rounding changes more than the adapter."""
        return self.total.of_update

    def __str__(self) -> str:
        lines = [
            f"error of the weights   {self.relative:.2%} of their size, {self.of_update:.0%} of the adapter's update",
            *(
                f"  {path}   {loss.relative:.2%}, {loss.of_update:.0%}"
                for path, loss in sorted(self.layers.items(), key=lambda item: -item[1].of_update)[:_SHOWN]
            ),
        ]
        if self.kl is not None:
            lines.append(f"KL to the adapted model {self.kl:.3g} nats a token, over {self.tokens} tokens")
            lines.append(f"same likeliest token   {self.top1:.1%}")
        return bullet_list(f"Merged into {len(self.layers)} quantised weights, which were rounded again:", lines)


def check_there_is_something_to_round(model: nn.Module) -> None:
    """Raise MergeError if no adapter is on a quantised weight."""
    if not has_quantised_sites(model):
        raise MergeError("No adapted weight is quantised, so there is nothing to round again: leave requantize out.")


def has_quantised_sites(model: nn.Module) -> bool:
    """Whether an adapter lies on a weight that is quantised."""
    return any(
        is_quantised(model.get_submodule(site.path), site.parameter)
        for name in overlay_needed(model).configs
        for site, _ in adapters_by_site(model, name)
    )


def requantization_report(model: nn.Module, sample: Any = None) -> RequantizationReport:
    """What merging the active adapters with `requantize` would cost. The model is as before, bit for bit.

    sample  token ids (N, T), or a mapping of the model's inputs with N rows each

    Raises MergeError, or ArgumentError if the sample is none or the model answers it with no logits.
    """
    check_there_is_something_to_round(model)
    if overlay_needed(model).route.in_weights:
        raise MergeError("Adapters are merged already: call unmerge_adapter() first.")
    before = None if sample is None else list(_log_probabilities(model, sample))
    losses: Losses = {}
    merge(model, None, losses)
    try:
        if before is None:
            return RequantizationReport(losses)
        return RequantizationReport(losses, **_compared(before, _log_probabilities(model, sample)))
    finally:
        unmerge(model)


def _compared(adapted: list[Tensor], merged: Iterator[Tensor]) -> dict[str, Any]:
    divergence, same, tokens = 0.0, 0, 0
    for p_TV, q_TV in zip(adapted, merged, strict=True):
        divergence += float((p_TV.exp() * (p_TV - q_TV)).sum())
        same += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
        tokens += len(p_TV)
    return {"kl": max(0.0, divergence / tokens), "top1": same / tokens, "tokens": tokens}


@torch.no_grad()
def _log_probabilities(model: nn.Module, sample: Any) -> Iterator[Tensor]:
    """(tokens, vocabulary) of each row of the sample, without padding, on the CPU."""
    inputs = {"input_ids": sample} if isinstance(sample, Tensor) else sample
    if not isinstance(inputs, Mapping) or not inputs or not all(isinstance(v, Tensor) for v in inputs.values()):
        raise ArgumentError(
            "A sample is a tensor of token ids, of shape (rows, tokens), or a mapping of such inputs by their names."
        )
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for row in range(len(next(iter(inputs.values())))):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            answer = model(one["input_ids"]) if list(one) == ["input_ids"] else model(**one)
            logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
            if not isinstance(logits, Tensor):
                raise ArgumentError(
                    f"The model answers with a {type(answer).__name__}, which has no logits to compare."
                )
            flat = logits[0].reshape(-1, logits.shape[-1])
            mask = one.get("attention_mask")
            if mask is not None and mask.shape[1] == len(flat):
                flat = flat[mask[0].bool()]
            yield flat.float().log_softmax(-1).cpu()
    finally:
        for module in was_training:
            module.training = True

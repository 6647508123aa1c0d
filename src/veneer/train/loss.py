"""The cross-entropy of a batch, summed over its learned tokens, without logits that nobody asks for.

The output head is often the widest layer of a model and its logits the largest tensor of a step, yet only tokens with a
label need them. Two ways, which give the same number:

    in the head        the model runs as ever, but its head answers with what it was given, and takes the loss from the
                       rows that carry a label, a chunk at a time (functional/cross_entropy.py). Right only where the
                       model's logits are the head's output and nothing else: `plain_head` finds that out.
    from the logits    the model computes them, in the columns of the batch that hold a label: for a head that is
                       adapted, trained apart or quantised, and for a model that scales, caps or masks its logits.

B batch, T tokens, K columns that hold a label, N tokens with a label, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from veneer.functional.cross_entropy import linear_cross_entropy
from veneer.train.tokens import IGNORED


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output head, if the logits are W h + b of an ordinary layer and nothing is done to them; else None.

    Found out by running one token through the model: it must return the very tensor that the head answered with,
    unchanged.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or any(type(p) is not nn.Parameter for p in head.parameters()):
        return None
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return None
    answers: list[tuple[Tensor, int]] = []

    def answer(h_BTD: Tensor) -> Tensor:
        answers.append((h_BTD, h_BTD._version))
        return h_BTD

    token_BT = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
    with torch.no_grad(), torch.random.fork_rng(), _answering(head, answer):
        logits = model(input_ids=token_BT, use_cache=False).logits
    unchanged = len(answers) == 1 and logits is answers[0][0] and logits._version == answers[0][1]
    return head if unchanged else None


def summed_loss(
    model: nn.Module, inputs: Mapping[str, Any], labels_BT: Tensor, head: nn.Linear | None
) -> tuple[Tensor, Any]:
    """The cross-entropy summed over the learned tokens of a batch, and what the model returned.

    head  what `plain_head` found, for the first way; the `logits` returned are no logits then. None: the second way.
    """
    if head is None or isinstance(model, nn.DataParallel):  # whose copies of the head are on other devices
        return _from_the_logits(model, inputs, labels_BT[:, 1:])
    return _in_the_head(model, inputs, labels_BT[:, 1:], head)


def _in_the_head(model: nn.Module, inputs: Mapping[str, Any], next_BT: Tensor, head: nn.Linear) -> tuple[Tensor, Any]:
    learned_BT = next_BT != IGNORED
    losses: list[Tensor] = []

    def answer(h_BTD: Tensor) -> Tensor:
        h_ND = h_BTD[:, :-1][learned_BT]
        losses.append(linear_cross_entropy(h_ND, head.weight, head.bias, next_BT[learned_BT]))
        return h_BTD

    with _answering(head, answer):
        outputs = model(**inputs, use_cache=False)
    (loss,) = losses
    return loss, outputs


def _from_the_logits(model: nn.Module, inputs: Mapping[str, Any], next_BT: Tensor) -> tuple[Tensor, Any]:
    columns_K = (next_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    if isinstance(model, nn.DataParallel):  # which would cut this tensor up like the batch
        columns_K = torch.arange(next_BT.shape[1], device=next_BT.device)
        outputs = model(**inputs, use_cache=False)
        logits_BKV = outputs.logits[:, :-1]
    else:
        outputs = model(**inputs, use_cache=False, logits_to_keep=columns_K)
        logits_BKV = outputs.logits
    loss = cross_entropy(
        logits_BKV.flatten(0, 1).float(), next_BT[:, columns_K].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, outputs


@contextmanager
def _answering(head: nn.Linear, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block the head's forward is `answer`: still inside its call, where FSDP has its weight at hand."""
    vars(head)["forward"] = answer
    try:
        yield
    finally:
        del vars(head)["forward"]

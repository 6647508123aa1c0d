"""Batched greedy answers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from veneer.train.data import Message
from veneer.train.tokens import render_prompt, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 16,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The most likely answer to each prompt, in their order.

    Prompts of like length share a batch, padded on the left. An answer ends at the first stop token or after
    `max_new_tokens`. `on_batch(done, total)` is called after each batch. The model is left in evaluation mode.
    """
    import torch

    texts = [render_prompt(prompt, tokenizer) for prompt in prompts]
    special = tokenizer.chat_template is None  # a template writes its own special tokens
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    answers = [""] * len(texts)
    model.eval()
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        inputs = tokenizer(
            [texts[at] for at in batch],
            add_special_tokens=special,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            ids = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop_ids(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        for at, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[at] = text
        if on_batch:
            on_batch(begin + len(batch), len(order))
    return answers

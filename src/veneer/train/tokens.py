"""Rows to token ids and labels: what the model learns to say, and what it only reads.

    ids     <|im_start|> user 2+2? <|im_end|> <|im_start|> assistant   4  <|im_end|>
    labels      -100     -100 -100    -100        -100        -100     4  <|im_end|>

Only the assistant's words and the token that ends its turn are learned. Where they lie is found by rendering the
conversation with and without them and comparing the token ids, so any chat template will do: none of the generation
markers that TRL's `assistant_only_loss` asks for, and the prompt is tokenised as it will be when the model is used.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from veneer.errors import DataError, bullet_list
from veneer.train.data import SHOWN_PROBLEMS, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100

TooLong = Literal["error", "drop", "cut"]


@dataclass(slots=True)
class Example:
    """Token ids of one sequence and, of equal length, the labels: an id to learn, or -100."""

    input_ids: list[int]
    labels: list[int]
    place: str


@dataclass
class Tokens:
    """What became of the rows: the examples, and a count of everything that was not used as it stood."""

    examples: list[Example]
    cut: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of tokens read in one pass."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def learned(self) -> int:
        """Number of tokens with a label."""
        return sum(label != IGNORED for example in self.examples for label in example.labels)

    def notes(self) -> list[str]:
        """A sentence for each thing that happened to rows on the way; empty if all were used whole."""
        texts = {"dropped, as longer than training.max_length": self.dropped, "cut at training.max_length": self.cut}
        return [f"{count_rows(places)} {what}: {some_of(places)}" for what, places in texts.items() if places]


def stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token ids at which this model stops: those of its generation config and the tokenizer's own."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({id_ for id_ in [*ids, tokenizer.eos_token_id] if id_ is not None})


def render_prompt(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text a model reads before it answers; without a chat template the contents one after another."""
    if tokenizer.chat_template is None:
        return "".join(message.content for message in messages)
    turns = [message.as_dict() for message in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def tokenise(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stops: Collection[int],
    max_length: int,
    too_long: TooLong = "error",
) -> Tokens:
    """Examples of at most `max_length` tokens, each of which ends in a stop token unless it was cut.

    Raises DataError, with the places, for rows the chat template refuses, for rows longer than `max_length` where
    `too_long` is "error", and always for rows of which nothing to learn would be left.
    """
    if tokenizer.chat_template is None and not all(row.plain for row in rows):
        raise DataError(
            "The data has 'messages', but the model's tokenizer has no chat template to render them with.\n"
            "  Use an instruct model, or rows of 'prompt' and 'completion'."
        )
    if not rows:
        return Tokens([])
    whole = [example for row in rows for example in _examples(row, tokenizer, set(stops))]
    _refuse_unusable(whole, max_length, too_long)
    fits = [example for example in whole if len(example.input_ids) <= max_length]
    long = [example for example in whole if len(example.input_ids) > max_length]
    if too_long == "drop":
        if not fits:
            raise DataError(f"All {len(whole)} rows are longer than training.max_length={max_length} tokens.")
        return Tokens(fits, dropped=[example.place for example in long])
    cut = [Example(e.input_ids[:max_length], e.labels[:max_length], e.place) for e in whole]
    return Tokens(cut, cut=[example.place for example in long])


def _refuse_unusable(examples: Sequence[Example], max_length: int, too_long: TooLong) -> None:
    long = [example for example in examples if len(example.input_ids) > max_length]
    if not long or too_long == "drop":
        return
    longest = max(len(example.input_ids) for example in long)
    if too_long == "error":
        raise DataError(
            bullet_list(
                f"{count_rows([e.place for e in long])} longer than training.max_length={max_length} tokens: "
                f"{some_of([e.place for e in long])}.",
                [
                    f"training.max_length={longest} keeps all of them whole",
                    "data.too_long=drop leaves them out",
                    "data.too_long=cut trains on their beginning",
                ],
            )
        )
    empty = [e.place for e in long if all(label == IGNORED for label in e.labels[:max_length])]
    if empty:
        raise DataError(
            bullet_list(
                f"{count_rows(empty)} with a prompt that alone fills training.max_length={max_length} tokens, so "
                f"nothing to learn would be left: {some_of(empty)}.",
                [f"training.max_length={longest} keeps all of them whole", "data.too_long=drop leaves long rows out"],
            )
        )


def count_rows(places: Sequence[str]) -> str:
    """How many rows these are.

    >>> count_rows(["line 3"])
    '1 row'
    """
    return "1 row" if len(places) == 1 else f"{len(places)} rows"


def some_of(places: Sequence[str]) -> str:
    """The first places, and how many there are besides."""
    shown = ", ".join(places[:SHOWN_PROBLEMS])
    return shown if len(places) <= SHOWN_PROBLEMS else f"{shown} and {len(places) - SHOWN_PROBLEMS} more"


def _examples(row: Row, tokenizer: "PreTrainedTokenizerBase", stops: set[int]) -> list[Example]:
    if tokenizer.chat_template is None:
        return [_running_text(row, tokenizer, stops)]
    return _conversation(row, tokenizer, stops)


def _running_text(row: Row, tokenizer: "PreTrainedTokenizerBase", stops: set[int]) -> Example:
    prompt, completion = (message.content for message in row.messages)
    prompt_ids = list(tokenizer(prompt)["input_ids"])
    ids = list(tokenizer(prompt + completion)["input_ids"])
    start = _common_prefix(prompt_ids, ids)
    return _ended(ids, {start: len(ids)}, row.place, tokenizer, stops)


def _conversation(row: Row, tokenizer: "PreTrainedTokenizerBase", stops: set[int]) -> list[Example]:
    """One example for the whole conversation.

    A template may render an earlier turn otherwise than the last one (reasoning left out, for instance). Such a turn
    is not learned where it stands but in an example of its own, which ends with it.
    """
    ids = _render(row.messages, row, tokenizer, answer_next=False)
    spans: dict[int, int] = {}
    apart: list[Example] = []
    last = len(row.messages) - 1
    for i, message in enumerate(row.messages):
        if message.role != "assistant":
            continue
        start = _common_prefix(_render(row.messages[:i], row, tokenizer, answer_next=True), ids)
        upto = ids if i == last else _render(row.messages[: i + 1], row, tokenizer, answer_next=False)
        if _common_prefix(upto, ids) == len(upto) and start < len(upto):
            spans[start] = len(upto)
        else:
            prompt = _render(row.messages[:i], row, tokenizer, answer_next=True)
            apart.append(_ended(upto, {_common_prefix(prompt, upto): len(upto)}, row.place, tokenizer, stops))
    return [_ended(ids, spans, row.place, tokenizer, stops), *apart]


def _render(
    messages: Sequence[Message], row: Row, tokenizer: "PreTrainedTokenizerBase", *, answer_next: bool
) -> list[int]:
    from jinja2 import TemplateError

    turns = [message.as_dict() for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next)
    except TemplateError as error:
        raise DataError(f"{row.place}: the model's chat template refuses this conversation: {error}") from None
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def _ended(
    ids: list[int], spans: dict[int, int], place: str, tokenizer: "PreTrainedTokenizerBase", stops: set[int]
) -> Example:
    """Labels for the spans, each up to its last stop token; a final span without one gets the tokenizer's."""
    labels = [IGNORED] * len(ids)
    for start, end in spans.items():
        found = [at for at in range(start, end) if ids[at] in stops]
        stop = found[-1] + 1 if found else end
        labels[start:stop] = ids[start:stop]
    used = max((at + 1 for at, label in enumerate(labels) if label != IGNORED), default=0)
    if not used:
        raise DataError(f"{place}: the model's chat template leaves out what the assistant says, nothing to learn.")
    ids, labels = ids[:used], labels[:used]
    if ids[-1] not in stops and tokenizer.eos_token_id is not None:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return Example(ids, labels, place)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = min(len(left), len(right))
    return next((at for at in range(length) if left[at] != right[at]), length)

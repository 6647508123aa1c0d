"""The rows a run trains and evaluates on: read, set apart, turned into tokens and held against the model."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import DataError, RunError, bullet_list
from veneer.train.data import Row, read_rows
from veneer.train.load import positions
from veneer.train.settings import RunConfig
from veneer.train.tokens import Tokens, count_rows, some_of, stop_ids, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sets:
    """Rows to train on and rows to evaluate on, and how many each file held, by setting."""

    train: list[Row]
    eval: list[Row]
    counts: dict[str, int]


def read_sets(settings: RunConfig) -> Sets:
    """Training and evaluation rows: from two files, or a share of the one drawn with the seed."""
    rows = read_rows(Path(settings.data.train))
    if settings.data.eval is not None:
        file = Path(settings.data.eval)
        eval_rows = [replace(row, place=f"{file.name} {row.place}") for row in read_rows(file)]
        return Sets(rows, eval_rows, {"data.train": len(rows), "data.eval": len(eval_rows)})
    count = round(len(rows) * settings.data.eval_fraction)
    if settings.data.eval_fraction and not 0 < count < len(rows):
        raise RunError(f"data.eval_fraction={settings.data.eval_fraction} of {len(rows)} rows leaves one part empty.")
    chosen = set(random.Random(settings.training.seed).sample(range(len(rows)), count))
    kept = [row for at, row in enumerate(rows) if at not in chosen]
    return Sets(kept, [rows[at] for at in sorted(chosen)], {"data.train": len(rows)})


def tokenise_sets(
    sets: Sets, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: RunConfig
) -> tuple[Tokens, Tokens]:
    """Both sets as tokens; DataError for rows that cannot be used, or are longer than the model can read."""
    stops = stop_ids(model, tokenizer)
    run, too_long = settings.training, settings.data.too_long
    data, eval_data = (
        tokenise(part, tokenizer, stops=stops, max_length=run.max_length, too_long=too_long)
        for part in (sets.train, sets.eval)
    )
    _refuse_beyond(data, positions(model))
    _refuse_beyond(eval_data, positions(model))
    return data, eval_data


def _refuse_beyond(tokens: Tokens, limit: int | None) -> None:
    """Raise DataError for examples that are longer than the model has positions for."""
    places = [example.place for example in tokens.examples if limit is not None and len(example.input_ids) > limit]
    if places:
        raise DataError(
            bullet_list(
                f"{count_rows(places)} longer than the {limit} tokens the model can read at once: {some_of(places)}.",
                [
                    f"training.max_length={limit} data.too_long=drop leaves them out",
                    f"training.max_length={limit} data.too_long=cut trains on their beginning",
                ],
            )
        )

"""The demonstration: a model that cannot do a task, an adapter trained for it, and the same questions again.

The task is to turn a US address as people write it into a JSON object (data and licence in `addresses/`). The prompt
is the same before and after and names the keys, so what is measured is what the adapter adds, not what it was told.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import MergeError, RunError
from veneer.model.model_card import card_of_model
from veneer.model.overlay import DEFAULT
from veneer.storage.write import write_file, write_folder
from veneer.train.card import scores_section
from veneer.train.data import Message, Row, read_rows
from veneer.train.folders import is_empty, refuse_unwritable
from veneer.train.generate import answer
from veneer.train.load import load_model, load_tokenizer
from veneer.train.packages import require
from veneer.train.progress import Progress
from veneer.train.quiet import quiet
from veneer.train.run import Result, train
from veneer.train.scoring import Scores, score
from veneer.train.settings import Data, Lora, RunConfig, Training
from veneer.train.small_model import NAME, small_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADDRESSES = Path(__file__).parent / "addresses"
INSTRUCTION = (
    "Answer with one JSON object and nothing else. "
    "Use these keys, each only if the address has it: name, number, street, unit, po_box, city, state, zip."
)
DATA_FILE, SETTINGS_FILE, REPORT_FILE, PICTURE_FILE = "addresses.jsonl", "run.yaml", "demo.json", "before-after.png"


@dataclass(frozen=True, slots=True)
class Size:
    """How much a demonstration does: rows trained on, rows scored, rows the merged model is compared on."""

    train_rows: int
    batch_size: int
    learning_rate: float
    scored_rows: int
    merged_rows: int
    max_new_tokens: int


FULL = Size(train_rows=320, batch_size=8, learning_rate=1e-3, scored_rows=64, merged_rows=8, max_new_tokens=80)
QUICK = Size(train_rows=48, batch_size=4, learning_rate=1.5e-3, scored_rows=8, merged_rows=3, max_new_tokens=80)


@dataclass(frozen=True, slots=True)
class Exam:
    """Questions, the answers expected, and those a model gave."""

    questions: list[str]
    expected: list[str]
    answers: list[str]
    scores: Scores


@dataclass
class Report:
    """What the demonstration measured and where it put everything."""

    output: Path
    model: Path
    before: Exam
    after: Exam
    result: Result
    merged_dir: Path
    merged_checked: int
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The scores, timings and settings as plain data."""
        return {
            "model": NAME,
            "before": asdict(self.before.scores),
            "after": asdict(self.after.scores),
            "steps": self.result.steps,
            "tokens": self.result.tokens,
            "trainable": self.result.trainable,
            "parameters": self.result.total,
            "first_loss": self.result.losses[0][1],
            "last_loss": self.result.losses[-1][1],
            "merged_answers_equal": self.merged_checked,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


class Clock:
    """Seconds by the name of what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str):
        """Time the block."""
        begun = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begun


def run(
    output: Path, size: Size, *, progress: Progress | None = None, on_before: Callable[[Exam], None] | None = None
) -> Report:
    """The whole demonstration, written to `output`; `on_before` is shown the untouched model's answers.

    Raises RunError if `output` holds something else, MergeError if the merged model answers otherwise than the
    adapter did, and what `small_model` and `train` raise.
    """
    require("demo")
    progress = progress or Progress()
    if not is_empty(output) and not (output / DATA_FILE).is_file():
        raise RunError(f"{output} is not empty and not from an earlier demo. Name another folder with --output.")
    refuse_unwritable(output)
    clock = Clock()
    with clock("total"):
        with clock("get the model"):
            folder = small_model(progress)
        settings = _settings(folder, output, size)
        test = _rows("test.jsonl", size.scored_rows)
        with quiet():
            tokenizer = load_tokenizer(str(folder))
            with clock("answer before"):
                before = _examine(_base(folder), tokenizer, test, size, progress, "Asking the untouched model")
            if on_before:
                on_before(before)
            with clock("train"):
                result = train(settings, progress=progress)
            adapted = _with_adapter(folder, result.adapter_dir)
            with clock("answer after"):
                after = _examine(adapted, tokenizer, test, size, progress, "Asking the reloaded adapter")
            said = {"scores": scores_section(before.scores, after.scores, INSTRUCTION)}
            card_of_model(adapted.get_base_model(), DEFAULT, result.adapter_dir, said=said)
            with clock("merge"):
                merged_dir = output / "merged"
                _merge(adapted, tokenizer, merged_dir)
                progress.say(f"Merged adapter and model into {merged_dir}")
                _check_merged(merged_dir, tokenizer, after, test, size, progress)
    report = Report(output, folder, before, after, result, merged_dir, size.merged_rows, clock.seconds)
    write_file(output / REPORT_FILE, (json.dumps(report.as_json(), indent=2) + "\n").encode())
    return report


def _settings(model: Path, output: Path, size: Size) -> RunConfig:
    """The run, and its data as a file, so that `veneer train OUTPUT/run.yaml` does the same again."""
    output.mkdir(parents=True, exist_ok=True)
    rows = _rows("train.jsonl", size.train_rows)
    lines = [json.dumps({"messages": [message.as_dict() for message in row.messages]}) for row in rows]
    write_file(output / DATA_FILE, ("\n".join(lines) + "\n").encode())
    return RunConfig(
        model=str(model),
        dtype="float32",
        data=Data(train=str(output / DATA_FILE)),
        lora=Lora(r=16, lora_alpha=32),
        training=Training(batch_size=size.batch_size, learning_rate=size.learning_rate, warmup=0, max_length=512),
        output=str(output),
        overwrite=True,
    )


def _rows(file: str, count: int) -> list[Row]:
    """The first rows of a bundled file, with the instruction before each."""
    rows = read_rows(ADDRESSES / file)[:count]
    return [Row((Message("system", INSTRUCTION), *row.messages), row.place, plain=False) for row in rows]


def _base(folder: Path) -> "PreTrainedModel":
    from veneer.train.load import device

    model: Any = load_model(str(folder), dtype="float32")
    return model.to(device())


def _with_adapter(folder: Path, adapter: Path) -> Any:
    from veneer import PeftModel

    return PeftModel.from_pretrained(_base(folder), str(adapter))


def _examine(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    size: Size,
    progress: Progress,
    title: str,
) -> Exam:
    expected = [row.messages[-1].content for row in rows]
    answers = _ask(model, tokenizer, rows, size, progress, title)
    return Exam([row.messages[1].content for row in rows], expected, answers, score(answers, expected))


def _ask(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    size: Size,
    progress: Progress,
    title: str,
) -> list[str]:
    prompts = [row.messages[:-1] for row in rows]
    with progress.bar(title):
        return answer(
            model, tokenizer, prompts, max_new_tokens=size.max_new_tokens, batch_size=32, on_batch=progress.advance
        )


def _merge(adapted: Any, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    merged = adapted.merge_and_unload()

    def fill(stage: Path) -> None:
        merged.save_pretrained(str(stage))
        tokenizer.save_pretrained(str(stage))

    write_folder(folder, fill)


def _check_merged(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", after: Exam, rows: Sequence[Row], size: Size, progress: Progress
) -> None:
    """Raise MergeError unless the merged model, read from disk, answers as the adapter did."""
    answers = _ask(_base(folder), tokenizer, rows[: size.merged_rows], size, progress, "Asking the merged model")
    wrong = [at for at, text in enumerate(answers) if text != after.answers[at]]
    if wrong:
        at = wrong[0]
        raise MergeError(
            f"The merged model answers {len(wrong)} of {len(answers)} questions otherwise than the adapter did.\n"
            f"  adapter: {after.answers[at]}\n  merged:  {answers[at]}"
        )

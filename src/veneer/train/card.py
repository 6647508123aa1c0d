"""What a run adds to its adapter's model card: the data, how it was trained, and what was scored."""

from collections.abc import Sequence
from pathlib import Path

from veneer.model.card import table
from veneer.train.progress import counted, duration
from veneer.train.resume import Fingerprint
from veneer.train.scoring import Scores
from veneer.train.settings import RunConfig


def training_section(
    settings: RunConfig,
    data: Fingerprint,
    losses: Sequence[tuple[int, float]],
    eval_losses: Sequence[tuple[int, float]],
    *,
    steps: int,
    tokens: int,
    seconds: float,
    dtype: str,
    processes: int = 1,
) -> str:
    """How an adapter was trained, as Markdown. losses: (step, loss per token); files appear by their names alone.

    dtype  of the base, as it was: "float32"
    """
    run = settings.training
    evaluated = data.get("data.eval")
    share = settings.data.eval_fraction
    rows = [
        ("data", _file(data["data.train"])),
        ("evaluated on", _file(evaluated) if evaluated else f"{100 * share:g} % of the rows" if share else None),
        ("length", f"{counted(steps, 'step')}{f', {run.epochs:g} × the data' if run.epochs else ''}"),
        ("batch", f"{processes * run.batch_size * run.gradient_accumulation} rows of at most {run.max_length} tokens"),
        ("processes", processes if processes > 1 else None),
        ("tokens", f"{tokens:,}"),
        ("optimizer", f"{run.optimizer}, learning rate {run.learning_rate:g}, {run.schedule}"),
        ("precision of the base", dtype),
        ("seed", run.seed),
        ("loss", f"{losses[0][1]:.3f} at first, {losses[-1][1]:.3f} at last" if losses else None),
        ("evaluation loss", f"{eval_losses[-1][1]:.3f}" if eval_losses else None),
        ("time", duration(seconds)),
    ]
    return f"## Training\n\n{table('', '', rows)}"


def scores_section(before: Scores, after: Scores, task: str) -> str:
    """What the demonstration measured, as Markdown."""
    names = {"valid": "one JSON object and nothing else", "exact": "exactly the expected object", "f1": "F1 of fields"}
    lines = [f"| {label} | {_score(name, before)} | {_score(name, after)} |" for name, label in names.items()]
    head = ["| | model alone | with the adapter |", "|---|---|---|"]
    text = f"On {counted(after.rows, 'row')} that it was not trained on. Each was asked with the instruction:"
    return "\n".join(["## Scores", "", text, "", f"> {task}", "", *head, *lines])


def _score(name: str, scores: Scores) -> str:
    value: float = getattr(scores, name)
    return f"{value:.2f}" if name == "f1" else f"{100 * value:.0f} %"


def _file(part: dict[str, object]) -> str:
    return f"`{Path(str(part['file'])).name}`, {part['rows']:,} rows (SHA-256 `{str(part['sha256'])[:12]}…`)"

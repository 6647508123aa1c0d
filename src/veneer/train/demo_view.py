"""The demonstration on the screen."""

import json
import os
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from veneer.train.demo import INSTRUCTION, PICTURE_FILE, REPORT_FILE, SETTINGS_FILE, Exam, Report
from veneer.train.progress import counted, duration
from veneer.train.scoring import Scores

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 3
SHORT = 120
QUESTION = "Parse this US address into JSON: 55 W 8th St, Apt 3, New York, NY 10011"


def show_before(console: "Console", exam: Exam) -> None:
    """What the untouched model makes of a few held-out addresses."""
    from rich.text import Text

    console.print("\n[bold]The untouched model[/bold], on addresses it is never trained on:\n")
    for question, given in list(zip(exam.questions, exam.answers, strict=True))[:SHOWN]:
        console.print(Text("  " + _address(question), style="bold"))
        console.print(Text("  " + _short(given), style="red"))
    console.print()


def show_report(console: "Console", report: Report) -> None:
    """Scores before and after, answers side by side, and where everything lies."""
    console.print()
    console.print(_scores(report.before.scores, report.after.scores))
    console.print(_side_by_side(report))
    seconds = report.seconds
    console.print(
        f"Trained {report.result.trainable:,} of {report.result.total:,} parameters "
        f"({100 * report.result.trainable / report.result.total:.2f} %) in {counted(report.result.steps, 'step')}, "
        f"{duration(seconds['train'])}; everything together {duration(seconds['total'])}."
    )
    console.print(f"The merged model gives the same answers ({report.merged_checked} of {report.merged_checked}).\n")
    show_places(console, report)


def show_places(console: "Console", report: Report) -> None:
    """Where everything lies and what to type next."""
    from rich.table import Table

    out = report.output
    places = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    places.add_column(style="bold", overflow="fold")
    places.add_column()
    rows = [
        (report.result.adapter_dir, "the adapter, in PEFT's format"),
        (report.merged_dir, "the model with the adapter merged in"),
        (out / PICTURE_FILE, "answers and scores, before and after"),
        *([(report.result.plot, "the training loss")] if report.result.plot else []),
        (report.result.log_file, "every step in numbers"),
        (out / SETTINGS_FILE, "this run's settings"),
        (out / REPORT_FILE, "scores and timings"),
    ]
    for path, what in rows:
        places.add_row(str(path), what)
    console.print(places)
    console.print("\nNext:", style="bold")
    adapter = quote(str(report.result.adapter_dir))
    for command in (
        f"inspect {adapter}",
        f"chat {adapter} --system {quote(INSTRUCTION)} --prompt {quote(QUESTION)}",
        f"targets {quote(str(report.model))}",
        "init run.yaml",
    ):
        console.print(f"  {as_called()} {command}", markup=False, highlight=False, soft_wrap=True)


def as_called() -> str:
    """How to call this program: `veneer` where that is on the path, or else as it was called this time."""
    called = Path(sys.argv[0])
    if shutil.which("veneer") or not called.name.startswith("veneer"):
        return "veneer"
    return quote(os.path.relpath(called))


def _scores(before: Scores, after: Scores):
    from rich.table import Table

    table = Table(title=f"{before.rows} held-out addresses", title_justify="left", title_style="bold")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("valid JSON", f"{before.valid:.0%}", f"[green]{after.valid:.0%}[/green]")
    table.add_row("exactly right", f"{before.exact:.0%}", f"[green]{after.exact:.0%}[/green]")
    table.add_row("field F1", f"{before.f1:.2f}", f"[green]{after.f1:.2f}[/green]")
    return table


def _side_by_side(report: Report):
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Side by side", title_justify="left", title_style="bold", show_lines=True)
    for column in ("address", "before", "after", "expected"):
        table.add_column(column, overflow="fold", ratio=1)
    for at in range(SHOWN):
        expected = report.after.expected[at]
        right = _same(report.after.answers[at], expected)
        table.add_row(
            Text(_address(report.before.questions[at])),
            Text(_short(report.before.answers[at]), style="red"),
            Text(_short(report.after.answers[at]), style="green" if right else "yellow"),
            Text(_short(expected)),
        )
    return table


def _same(given: str, expected: str) -> bool:
    try:
        return json.loads(given) == json.loads(expected)
    except ValueError:
        return False


def _address(question: str) -> str:
    return question.partition(": ")[2]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHORT else line[: SHORT - 1] + "…"

"""before-after.png: what the model answered before and after the adapter, and the scores."""

from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from veneer.train.demo import Report
from veneer.train.plot import FAINT, INK, LINE

MUTED, WRONG = "#6b7280", "#b91c1c"
SHOWN = 2
WIDTH = 74  # characters of a line of the answers


def draw_before_after(report: Report, path: Path) -> None:
    """Draw a PNG file. Needs matplotlib, not a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    answers, scores = figure.subplots(1, 2, width_ratios=(2.1, 1))
    figure.subplots_adjust(left=0.02, right=0.985, top=0.86, bottom=0.09, wspace=0.12)
    _draw_answers(answers, report)
    _draw_scores(scores, report)
    figure.savefig(path)


def _draw_answers(axes: Any, report: Report) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_title("Two addresses the model was never trained on", loc="left", color=INK, fontweight="bold")
    for at in range(min(SHOWN, len(report.before.questions))):
        top = 0.97 - at * 0.5
        question = report.before.questions[at].partition(": ")[2]
        axes.text(0, top, shorten(question, WIDTH), color=INK, fontweight="bold", fontsize=10.5, va="top")
        for label, text, color, down in (
            ("before", report.before.answers[at], WRONG, 0.085),
            ("after", report.after.answers[at], LINE, 0.25),
        ):
            lines = wrap(" ".join(text.split()), WIDTH)
            shown = lines[:2] if len(lines) <= 2 else [lines[0], lines[1][: WIDTH - 1] + "…"]
            axes.text(0, top - down, label, color=MUTED, fontsize=9.5, va="top")
            axes.text(
                0.085, top - down, "\n".join(shown), color=color, fontsize=9.5, va="top", family="monospace",
                linespacing=1.35,
            )  # fmt: skip


def _draw_scores(axes: Any, report: Report) -> None:
    before, after = report.before.scores, report.after.scores
    names = ("valid JSON", "exactly right", "field F1")
    pairs = ((before.valid, after.valid), (before.exact, after.exact), (before.f1, after.f1))
    for at, (was, now) in enumerate(pairs):
        axes.barh(at - 0.19, was, height=0.34, color=FAINT)
        axes.barh(at + 0.19, now, height=0.34, color=LINE)
        for offset, value in ((-0.19, was), (0.19, now)):
            text = f"{value:.2f}" if names[at] == "field F1" else f"{value:.0%}"
            axes.text(value + 0.015, at + offset, text, va="center", color=INK, fontsize=10)
    axes.set_yticks(range(3), names, color=INK, fontsize=10.5)
    axes.set_ylim(2.6, -0.6)
    axes.set_xlim(0, 1.16)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(f"{before.rows} held-out addresses", loc="left", color=INK, fontweight="bold")
    axes.legend(
        handles=[axes.patches[0], axes.patches[1]], labels=["before", "after"], loc="lower right", frameon=False
    )

"""loss.png: the training loss, raw and smoothed, and the evaluation loss if there is one."""

from collections.abc import Sequence
from pathlib import Path

Curve = Sequence[tuple[int, float]]

INK, LINE, FAINT, ACCENT = "#1f2933", "#2563eb", "#93b4f5", "#d97706"


def smoothed(values: Sequence[float], *, keep: float = 0.8) -> list[float]:
    """Exponential moving average without the bias of its start.

    >>> smoothed([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    total = weight = 0.0
    averages = []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def plot_losses(losses: Curve, path: Path, *, eval_losses: Curve = (), title: str = "Training loss") -> None:
    """Draw (step, loss) pairs into a PNG file. Needs matplotlib, not a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [step for step, _ in losses]
    values = [loss for _, loss in losses]
    axes.plot(steps, values, color=FAINT, linewidth=1, label="each step")
    axes.plot(steps, smoothed(values), color=LINE, linewidth=2.2, label="smoothed")
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), "o-", color=ACCENT, linewidth=1.5, markersize=4, label="evaluation")
    all_values = [*values, *(loss for _, loss in eval_losses)]
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss per token", color=INK)
    if min(all_values) <= max(all_values) / 2:  # else the curve would be a flat line at the top
        axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.legend(frameon=False)
    figure.savefig(path)

"""A picture for each figure: bars of ratios, or lines over an axis. In Okabe and Ito's colours, which all can tell."""

import math
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.record import Figure, Table, quartiles

OURS, THEIRS, OTHERS, AIM = "#0072B2", "#E69F00", "#8C8C8C", "#D55E00"
WIDTH = 6.0  # inches of one table's plot
COLUMNS = 2


def draw(figure: Figure, folder: Path) -> Path | None:
    """Write `<name>.png`; None if the figure has nothing to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tables = [table for table in figure.tables if table.plot]
    if not tables:
        return None
    lines = [tables[start : start + COLUMNS] for start in range(0, len(tables), COLUMNS)]
    heights = [max(_height(table) for table in line) for line in lines]
    columns = min(COLUMNS, len(tables))
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        picture, grid = plt.subplots(
            len(lines),
            columns,
            figsize=(WIDTH * columns, sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        places = [place for row in grid for place in row]
        for place, table in zip(places, tables, strict=False):
            (_lines if table.axis else _bars)(place, table)
            place.set_title(textwrap.fill(table.title, 48), loc="left", fontsize=10, fontweight="bold")
        for place in places[len(tables) :]:
            place.set_axis_off()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{figure.name}.png"
        picture.savefig(file, dpi=110, facecolor="white", metadata={"Software": None})
        plt.close(picture)
    return file


def _height(table: Table) -> float:
    return 3.2 if table.axis else 1.0 + 0.27 * len(table.rows)


def colour(name: str) -> str:
    """Of a contender, by whose it is."""
    if name.startswith("Veneer"):
        return OURS
    return THEIRS if "PEFT" in name else OTHERS


def _bars(place: Any, table: Table) -> None:
    """A bar a row, the first on top: the ratio with its quartiles, or the median; a mark where the aim is."""
    names = [row.name for row in table.rows]
    values = {row.name: table.ratios(row.name) or row.values for row in table.rows}
    medians = [table.ratio(row.name) if table.reference else row.median for row in table.rows]
    place.barh(names, medians, color=[colour(name) for name in names], height=0.7)
    for at, (name, median) in enumerate(zip(names, medians, strict=True)):
        first, third = quartiles(values[name])
        if third > first:
            place.plot([first, third], [at, at], color="black", linewidth=1)
        place.annotate(f"{median:.3g}", (max(median, third), at), (4, 0), textcoords="offset points", va="center")
    for at, row in enumerate(table.rows):
        if row.aim:
            bound = row.aim.at_most if row.aim.at_most is not None else row.aim.at_least
            assert bound is not None
            scale = medians[names.index(row.aim.against)] if row.aim.against else 1.0
            place.plot([bound * scale] * 2, [at - 0.42, at + 0.42], color=AIM, linewidth=2)
    place.invert_yaxis()
    measured = f"× {table.reference}" if table.reference else table.unit
    place.set_xlabel(f"{measured} (red mark: the aim)" if any(row.aim for row in table.rows) else measured)
    if table.reference:
        place.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    if min(medians) > 0 and max(medians) / min(medians) > 30:
        place.set_xscale("log")
    place.margins(x=0.12)


def _lines(place: Any, table: Table) -> None:
    """A line a contender, both axes logarithmic; dashed what the arithmetic gives."""
    unit = table[table.reference].median if table.reference else 1.0
    series: dict[str, list] = {}
    for row in table.rows:
        if row.at:
            series.setdefault(row.at[0], []).append((row.at[1], row))
    for name, points in series.items():
        xs, rows = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        ratios = [table.ratio(row.name) if table.reference else row.median / unit for row in rows]
        place.plot(xs, ratios, color=colour(name), marker="o", markersize=4, label=name)
        if all(row.expected for row in rows):
            expected = [row.expected for row in rows]
            place.plot(xs, expected, color=colour(name), linestyle="--", linewidth=1, label=f"{name}, by arithmetic")
    place.set_xscale("log", base=2)
    ticks = sorted({row.at[1] for row in table.rows if row.at})
    place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    place.minorticks_off()
    shown = [value for line in place.get_lines() for value in line.get_ydata()]
    if shown and min(shown) > 0 and math.log(max(shown) / min(shown)) > math.log(4):
        place.set_yscale("log", base=2)
        place.yaxis.set_major_formatter("{x:g}")
    else:
        place.set_ylim(bottom=0)
    place.set_xlabel(table.axis)
    place.set_ylabel(f"× {table.reference}" if table.reference else table.unit)
    place.legend(frameon=False, fontsize=8)

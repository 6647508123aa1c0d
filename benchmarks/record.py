"""What was measured, as data. A figure holds tables, a table rows, a row one value a round; everything else follows.

The JSON keeps the values themselves: medians, spreads, ratios and whether an aim was met are computed when asked for.
"""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Aim:
    """The bound that a row's ratio to another row (by default to the table's reference) should keep."""

    at_most: float | None = None
    at_least: float | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        assert (self.at_most is None) != (self.at_least is None), "an aim has one bound"

    def met(self, ratio: float) -> bool:
        """Whether the ratio keeps to the bound."""
        return ratio <= self.at_most if self.at_most is not None else ratio >= (self.at_least or 0.0)

    def __str__(self) -> str:
        bound = f"≤ {self.at_most:g}" if self.at_most is not None else f"≥ {self.at_least:g}"
        return f"{bound} × {self.against}" if self.against else bound


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and third quartile; of a single value, that value."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


@dataclass(frozen=True)
class Row:
    """One contender: its value in each round.

    expected  the ratio to the table's reference that the arithmetic gives
    at        (line, place on the table's axis), where the table is drawn as lines
    """

    name: str
    values: list[float]
    aim: Aim | None = None
    expected: float | None = None
    at: tuple[str, float] | None = None

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartile."""
        return quartiles(self.values)


@dataclass(frozen=True)
class Table:
    """Contenders that were measured in turn, so that round i of one stands beside round i of another.

    unit       of the values: "s", "ms", "MiB", "tokens/s", …
    reference  the row that ratios are to; None: no ratios
    setting    what was measured: model, dtype, rank, …
    plot       whether the page draws it
    axis       what the rows' places are of (rank, tokens, …), if it is drawn as lines; by default as bars
    """

    title: str
    rows: list[Row]
    reference: str | None = None
    unit: str = "s"
    setting: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    plot: bool = True
    axis: str | None = None

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def ratios(self, name: str, against: str | None = None) -> list[float]:
        """One row's value by another's (by default the reference's), for each round; empty without a reference.

        By a value of 0 there is no ratio: nan, which meets no aim.
        """
        other = against or self.reference
        if other is None:
            return []
        pairs = zip(self[name].values, self[other].values, strict=True)
        return [value / base if base else math.nan for value, base in pairs]

    def ratio(self, name: str, against: str | None = None) -> float:
        """The median of `ratios`. Raises StatisticsError without a reference."""
        return statistics.median(self.ratios(name, against))

    def judged(self) -> Iterator[tuple[Row, Aim, float, bool]]:
        """(row, aim, ratio, met) of each row that has an aim."""
        for row in self.rows:
            if row.aim:
                ratio = self.ratio(row.name, row.aim.against)
                yield row, row.aim, ratio, row.aim.met(ratio)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table as text: its head, and a line a row. A column that would be empty is left out."""
        middle = f"median, {self.unit}" if any(row.values[1:] for row in self.rows) else self.unit
        columns = {
            "": [row.name for row in self.rows],
            middle: [f"{row.median:.4g}" for row in self.rows],
            "quartiles": [f"{row.spread[0]:.4g} to {row.spread[1]:.4g}" if row.values[1:] else "" for row in self.rows],
            f"× {self.reference}": [f"{self.ratio(row.name):.2f}" if self.reference else "" for row in self.rows],
            "by arithmetic": [f"{row.expected:.2f}" if row.expected else "" for row in self.rows],
        }
        verdicts = {row.name: f"{'met' if met else 'missed'}: {ratio:.3f}" for row, _, ratio, met in self.judged()}
        columns["aim"] = [str(row.aim or "") for row in self.rows]
        columns["met?"] = [verdicts.get(row.name, "") for row in self.rows]
        kept = {head: column for head, column in columns.items() if any(column)}
        return list(kept), [list(line) for line in zip(*kept.values(), strict=True)]


@dataclass(frozen=True)
class Figure:
    """One script's tables, what they were measured on, and what is to be said about them.

    name   of the script and the JSON file
    about  one paragraph for the page: what is compared, and what the arithmetic says
    quick  a smoke run: too short to claim anything
    """

    name: str
    title: str
    about: str
    tables: list[Table]
    machine: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    def save(self, folder: Path = RESULTS) -> Path:
        """Write `<name>.json` into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}.json"
        file.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, file: Path) -> "Figure":
        """The figure that `save` wrote."""
        data = json.loads(file.read_text(encoding="utf-8"))
        made: dict[str, Any] = {**data, "tables": [_table(table) for table in data["tables"]]}
        return cls(**made)


def _table(data: dict[str, Any]) -> Table:
    made: dict[str, Any] = {**data, "rows": [_row(row) for row in data["rows"]]}
    return Table(**made)


def _row(data: dict[str, Any]) -> Row:
    aim, at = data.get("aim"), data.get("at")
    made: dict[str, Any] = {**data, "aim": Aim(**aim) if aim else None, "at": tuple(at) if at else None}
    return Row(**made)

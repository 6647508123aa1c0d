"""The page says what the records hold, no more and no less."""

import pytest

from benchmarks.plots import colour, draw
from benchmarks.record import Aim, Figure, Row, Table
from benchmarks.render import DOCS, FIGURES, page, read, write

STEP = Table(
    "Two layers",
    [
        Row("limit", [1.0, 2.0, 3.0]),
        Row("PEFT", [1.5, 3.0, 4.5]),
        Row("Veneer", [1.2, 2.4, 3.6], Aim(at_most=1.1), expected=1.05),
        Row("Veneer, dropout", [1.2, 2.4, 3.6], Aim(at_most=0.9, against="PEFT")),
    ],
    reference="limit",
    setting={"rank": 16},
    note="A note\nover two lines.",
)
GROWTH = Table(
    "Rank",
    [Row("limit", [1.0])] + [Row(f"Veneer {r}", [1.0 + r / 100], expected=1.1, at=("Veneer", r)) for r in (8, 16)],
    reference="limit",
    axis="rank",
)
MACHINE = {"cpu": "A processor", "cores": 2, "torch": "3"}
FIGURE = Figure("step", "Training step", "About\nthis.", [STEP, GROWTH], MACHINE)


def test_a_table_has_median_quartiles_ratio_and_whether_the_aim_was_met() -> None:
    text = page([FIGURE], {})
    assert "|  | median, s | quartiles | × limit | by arithmetic | aim | met? |" in text
    assert "| Veneer | 2.4 | 1.8 to 3 | 1.20 | 1.05 | ≤ 1.1 | missed: 1.200 |" in text
    assert "| Veneer, dropout | 2.4 | 1.8 to 3 | 1.20 |  | ≤ 0.9 × PEFT | met: 0.800 |" in text


def test_every_aim_is_listed_and_counted() -> None:
    text = page([FIGURE], {})
    assert "## Aims: 1 of 2 met" in text
    assert "| Two layers | Veneer | limit | 1.200 | ≤ 1.1 | **missed** |" in text
    assert "| Two layers | Veneer, dropout | PEFT | 0.800 | ≤ 0.9 | met |" in text


def test_the_page_says_what_was_measured_where() -> None:
    text = page([FIGURE], {"step": "benchmarks/step.png"})
    assert "\nAbout this.\n" in text
    assert "\nA note over two lines.\n" in text
    assert "Measured on A processor, 2 cores: torch 3." in text
    assert "![Training step](benchmarks/step.png)" in text
    assert "Rank 16." in text


def test_a_smoke_run_claims_nothing() -> None:
    assert "A smoke run" not in page([FIGURE], {})
    assert "A smoke run" in page([Figure("step", "S", "a", [STEP], quick=True)], {})


def test_pictures_and_page_are_written(tmp_path) -> None:
    FIGURE.save(tmp_path / "results")
    Figure("scaling", "Nothing to draw", "a", [Table("t", [Row("a", [1.0])], plot=False)]).save(tmp_path / "results")
    file = write(tmp_path / "results", tmp_path)
    assert (tmp_path / "benchmarks" / "step.png").stat().st_size > 10_000
    assert not (tmp_path / "benchmarks" / "scaling.png").exists()
    assert "## Training step" in file.read_text(encoding="utf-8")


def test_the_same_record_gives_the_same_picture(tmp_path) -> None:
    first, second = draw(FIGURE, tmp_path / "a"), draw(FIGURE, tmp_path / "b")
    assert first is not None
    assert second is not None
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("name", "whose"), [("Veneer LoRA", "Veneer"), ("TRL + PEFT", "PEFT"), ("PEFT LoRA", "PEFT"), ("limit", "limit")]
)
def test_a_colour_tells_whose_a_row_is(name: str, whose: str) -> None:
    assert colour(name) == colour(whose)
    assert len({colour("Veneer"), colour("PEFT"), colour("limit")}) == 3


def test_the_page_in_the_documentation_is_that_of_the_records() -> None:
    figures = read()
    pictures = {figure.name: f"benchmarks/{figure.name}.png" for figure in figures}
    drawn = {name: address for name, address in pictures.items() if (DOCS / address).exists()}
    if figures:
        assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == page(figures, drawn)
    assert {figure.name for figure in figures} <= set(FIGURES)
    assert not any(figure.quick for figure in figures)

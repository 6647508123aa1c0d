from io import StringIO

import pytest
from rich.console import Console

from veneer.train.progress import Live, Plain, Progress, Step, clock, duration, for_console, sparkline

STEPS = [Step(n, 5, 1.0 / n, 100.0, 60.0, 1 << 30) for n in range(1, 6)]


def console(*, terminal: bool) -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, force_terminal=terminal, width=160, legacy_windows=False), text


def run(progress: Progress) -> None:
    with progress.bar("Training"):
        for step in STEPS:
            progress.step(step)
    with progress.bar("Asking"):
        progress.advance(2, 2)
    progress.say("done [1/2]")


def test_a_pipe_gets_plain_lines_few_and_the_last() -> None:
    where, text = console(terminal=False)
    progress = for_console(where)
    assert isinstance(progress, Plain)
    run(progress)
    lines = text.getvalue().splitlines()
    assert lines[0] == "Training"
    assert lines[1] == "  step 1/5   loss 1.000   100 tokens/s   1:00 left   1.0 GiB"
    assert lines[2].startswith("  step 5/5")
    assert lines[3:] == ["Asking", "  2/2", "done [1/2]"]
    assert "\x1b" not in text.getvalue()


def test_a_terminal_gets_a_bar_with_loss_speed_and_memory() -> None:
    where, text = console(terminal=True)
    progress = for_console(where)
    assert isinstance(progress, Live)
    run(progress)
    for part in ("Training", "5/5", "loss 0.200", "100 tokens/s", "1:00 left", "1.0 GiB", "Asking", "2/2"):
        assert part in text.getvalue()


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, set()),
        (80, {"memory"}),
        (100, {"memory", "clock", "speed"}),
        (120, {"memory", "clock", "speed", "curve"}),
        (140, {"memory", "clock", "speed", "curve"}),
    ],
)
def test_a_terminal_gets_one_line_that_fits(width: int, shown: set[str]) -> None:
    text = StringIO()
    where = Console(file=text, force_terminal=True, width=width, legacy_windows=False)
    live = Live(where)
    with live.bar("Training"):
        for n in range(1, 90):
            live.step(Step(1200 + n, 4500, 12.5 / n, 12345.0, 45000.0, 79 << 30))
        live._bars.refresh()
        recorded = Console(file=StringIO(), width=width)
        recorded.print(live._bars.get_renderable())
        lines = recorded.file.getvalue().splitlines()
    (line,) = lines
    assert "…" not in line
    assert len(line.rstrip()) <= width
    for part in ("1289/4500", "loss 0.140", "12:30:00 left"):
        assert part in line
    signs = {"memory": "79.0 GiB", "clock": "0:00:0", "speed": "12345 tokens/s", "curve": "█"}
    assert {name for name, sign in signs.items() if sign in line} == shown


def test_no_progress_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress())
    assert capsys.readouterr() == ("", "")


def test_sparkline_is_as_wide_as_asked_and_flat_for_equal_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    curve = sparkline([float(n) for n in range(100)], width=10)
    assert len(curve) == 10
    assert (curve[0], curve[-1]) == ("▁", "█")


def test_times() -> None:
    assert (clock(0), clock(59.6), clock(3600)) == ("0:00", "1:00", "1:00:00")
    assert (duration(5), duration(125)) == ("5 s", "2 min 5 s")

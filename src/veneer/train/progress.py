"""What the terminal shows while work goes on: one live line, or plain lines where there is no terminal."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
PLAIN_SECONDS = 10.0
WITH_MEMORY, WITH_CLOCK, WITH_CURVE = 80, 100, 120  # how wide a terminal must be to show them
WITHOUT_CURVE = 104  # what all the rest takes at most


@dataclass(frozen=True, slots=True)
class Step:
    """The state of a training run after a step; memory in bytes, `loss` None until it is first known."""

    step: int
    steps: int
    loss: float | None
    tokens_per_second: float
    seconds_left: float
    memory: int

    @property
    def loss_text(self) -> str:
        """The loss to three digits, or a dash."""
        return "-" if self.loss is None else f"{self.loss:.3f}"

    def __str__(self) -> str:
        """All of it in one line.

        >>> print(Step(step=10, steps=40, loss=0.5, tokens_per_second=210.4, seconds_left=75, memory=3 << 30))
        step 10/40   loss 0.500   210 tokens/s   1:15 left   3.0 GiB
        """
        return (
            f"step {self.step}/{self.steps}   loss {self.loss_text}   {self.tokens_per_second:.0f} tokens/s   "
            f"{clock(self.seconds_left)} left   {self.memory / 2**30:.1f} GiB"
        )


class Progress:
    """Shows nothing; the base of those that do."""

    def say(self, text: str) -> None:
        """A line that stays."""

    @contextmanager
    def bar(self, text: str) -> Iterator[None]:
        """While the block runs, `advance` and `step` move one bar called `text`."""
        yield

    def advance(self, done: int, total: int) -> None:
        """So many of so many are done."""

    def step(self, step: Step) -> None:
        """A training step is done."""


@dataclass
class Plain(Progress):
    """Lines for a file or a pipe: at most one every few seconds, and the last."""

    console: "Console"
    _last: float = field(default=float("-inf"), init=False)

    def say(self, text: str) -> None:
        """Print the line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, done: int, total: int) -> None:
        """Print the count when it is time."""
        self._sometimes(f"{done}/{total}", final=done == total)

    def step(self, step: Step) -> None:
        """Print the step when it is time."""
        self._sometimes(str(step), final=step.step == step.steps)

    def _sometimes(self, text: str, *, final: bool) -> None:
        now = time.monotonic()
        if final or now - self._last >= PLAIN_SECONDS:
            self._last = now
            self.say(f"  {text}")

    @contextmanager
    def bar(self, text: str) -> Iterator[None]:
        """Print the title; what moves is printed below it."""
        self._last = float("-inf")
        self.say(text)
        yield


@dataclass
class Live(Progress):
    """One line that moves: a bar, the loss with its curve, speed, time left and memory."""

    console: "Console"
    _losses: list[float] = field(default_factory=list, init=False)

    def say(self, text: str) -> None:
        """Print the line above whatever moves."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, text: str) -> Iterator[None]:
        """Draw a bar until the block ends."""
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        width = self.console.width
        columns = [
            TextColumn("[bold]{task.description}", table_column=_one_line()),
            BarColumn(bar_width=20 if width >= WITH_MEMORY else 8),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=_one_line()),
        ]
        if width >= WITH_CLOCK:
            columns.append(TimeElapsedColumn())
        if width >= WITH_CURVE:
            columns.append(TextColumn("{task.fields[curve]}", style="cyan", table_column=_one_line()))
        columns.append(TextColumn("{task.fields[state]}", table_column=_one_line()))
        self._losses = []
        with Bars(*columns, console=self.console) as self._bars:
            self._task = self._bars.add_task(text, total=1, curve="", state="")
            yield

    def advance(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bars.update(self._task, completed=done, total=total)

    def step(self, step: Step) -> None:
        """Move the bar and show the step's numbers."""
        if step.loss is not None and self._losses[-1:] != [step.loss]:
            self._losses.append(step.loss)
        width = self.console.width
        parts = {
            "loss": f"loss {step.loss_text}",
            "speed": f"{step.tokens_per_second:.0f} tokens/s" if width >= WITH_CLOCK else "",
            "left": f"{clock(step.seconds_left)} left",
            "memory": f"{step.memory / 2**30:.1f} GiB" if width >= WITH_MEMORY else "",
        }
        self._bars.update(
            self._task,
            completed=step.step,
            total=step.steps,
            curve=sparkline(self._losses, min(SPARK_WIDTH, width - WITHOUT_CURVE)) if width >= WITH_CURVE else "",
            state="  ".join(part for part in parts.values() if part),
        )


def for_console(console: "Console") -> Progress:
    """The progress that suits where the console writes."""
    return Live(console) if console.is_terminal else Plain(console)


def _one_line() -> "Column":
    from rich.table import Column

    return Column(no_wrap=True)


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """The values as a curve of block characters, thinned out to `width`.

    >>> sparkline([3.0, 2.0, 1.0])
    '█▄▁'
    """
    if len(values) > width:
        values = [values[at * (len(values) - 1) // (width - 1)] for at in range(width)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = (high - low) or 1.0
    return "".join(BLOCKS[int((value - low) / span * (len(BLOCKS) - 1))] for value in values)


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours too.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "step"), counted(2, "step")
    ('1 step', '2 steps')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """A time span in words.

    >>> duration(51), duration(75)
    ('51 s', '1 min 15 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

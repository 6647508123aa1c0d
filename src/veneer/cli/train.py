"""`veneer train`: an adapter from a run file."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    file: Annotated[Path, typer.Argument(help="The run file; `veneer init` writes one.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over the file's.")
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Several devices: ddp, fsdp2, deepspeed-zero2, deepspeed-zero3, or a config file of accelerate.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --launch: how many; by default one a device.")
    ] = None,
) -> None:
    """Train an adapter as a run file says.

    Example: [bold]veneer train run.yaml lora.r=32 training.epochs=2 output=runs/second[/bold]

    On several devices: [bold]veneer train run.yaml --launch ddp[/bold]; `torchrun … -m veneer.cli train run.yaml`
    and `accelerate launch … -m veneer.cli train run.yaml` do the same.

    Rows are {"prompt": …, "completion": …} or {"messages": […]} in .jsonl or .json. The result is OUTPUT/adapter in
    PEFT's format, with a log of every step and a plot of the loss beside it.
    """
    from veneer.train.packages import require

    require("train")
    from veneer.errors import RunError
    from veneer.train.run_file import load

    if launch is None and processes is not None:
        raise RunError("--processes says how many --launch starts: name a profile, --launch ddp for example.")
    if launch is not None:
        from veneer.train.launch import launch as start
        from veneer.train.resume import what_is_kept

        run_config = load(file, settings or [])  # what is wrong with it is said once, by this process
        arguments = [str(file), *(settings or [])]
        raise typer.Exit(start(launch, processes, arguments, kept=lambda: what_is_kept(run_config)))
    from veneer.cli.say import report
    from veneer.train.ranks import ending_together

    with ending_together(report):
        _train(file, settings or [])


def _train(file: Path, settings: list[str]) -> None:
    from rich.console import Console

    from veneer.train.progress import counted, duration, for_console
    from veneer.train.ranks import is_first
    from veneer.train.run_file import load

    run_config = load(file, settings)
    from veneer.train.run import train as run

    console = Console()
    result = run(run_config, progress=for_console(console))
    if not is_first():
        return
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

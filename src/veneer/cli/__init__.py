"""The command line: `veneer COMMAND`. One file a command; each loads torch only once it runs."""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import getdoc
from typing import Annotated, Any

import typer

from veneer._version import __version__
from veneer.cli.chat import chat
from veneer.cli.demo import demo
from veneer.cli.init import init
from veneer.cli.inspect import inspect
from veneer.cli.merge import merge
from veneer.cli.push import push
from veneer.cli.say import report, say
from veneer.cli.targets import targets
from veneer.cli.train import train
from veneer.errors import VeneerError, VeneerWarning
from veneer.train.ranks import is_first

app = typer.Typer(
    name="veneer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which Ctrl-C ends with a line about what is left behind, and exit code 130."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            raise typer.Exit(report(stop)) from None

    return run


def _flowing(command: Callable[..., None]) -> str:
    """What the command's help says: its docstring, each paragraph in one line, which the terminal breaks."""
    return "\n\n".join(" ".join(part.split()) for part in (getdoc(command) or "").split("\n\n"))


for command in (demo, init, train, chat, targets, inspect, merge, push):
    app.command(help=_flowing(command))(_stoppable(command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"veneer {__version__}")
        raise typer.Exit


@app.callback()
def veneer(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRA fine-tuning: a thin trainable layer over a frozen model.

    See it work: [bold]veneer demo[/bold]

    On your own data: [bold]veneer init[/bold], [bold]veneer train run.yaml[/bold],
    [bold]veneer chat runs/first/adapter[/bold]
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error of ours or of the system is printed to stderr without a traceback, with exit code 2."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", VeneerWarning)
            warnings.showwarning = _show_warning
        try:
            app(args=None if arguments is None else list(arguments))
        except (VeneerError, OSError) as error:
            sys.exit(report(error))


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if is_first():  # of several processes of a run
        say("Note", str(message), "yellow")

"""How a command says what went wrong: on stderr, without a traceback where it is ours or the system's."""

import sys
import traceback

from veneer.errors import VeneerError

FAILED, BROKEN, INTERRUPTED = 2, 1, 130  # exit codes: an error in words, one of the program, Ctrl-C


def say(label: str, message: str, style: str) -> None:
    """One message on stderr, its label in colour where there is a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble((f"{label}: " if label else "", style), message), soft_wrap=True)


def report(error: BaseException) -> int:
    """Say what went wrong, and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, KeyboardInterrupt):
        say("", str(error) or "Stopped.", "yellow")
        return INTERRUPTED
    if isinstance(error, VeneerError):
        say(type(error).__name__, str(error), "bold red")
        return FAILED
    if isinstance(error, OSError):
        say("Error", in_one_line(error), "bold red")
        return FAILED
    traceback.print_exception(error, file=sys.stderr)
    return BROKEN


def in_one_line(error: OSError) -> str:
    """An error of the system with the file it is about."""
    reason = error.strerror or str(error).partition("\n")[0] or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason

"""Run a program that was written for PEFT on Veneer: `python -m veneer.as_peft program.py …`, or `… -m module …`."""

import runpy
import sys
from pathlib import Path

from veneer.errors import VeneerError
from veneer.integrations.as_peft import install_as_peft

USAGE = "usage: python -m veneer.as_peft program.py [arguments]\n       python -m veneer.as_peft -m module [arguments]"


def main(arguments: list[str]) -> None:
    """Put the alias in place and run the program as if Python had been called with the rest of the line."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        sys.exit(USAGE if arguments[:1] in (["-h"], ["--help"]) else f"{USAGE}\nwhich program?")
    try:
        install_as_peft()
    except VeneerError as error:
        sys.exit(f"veneer: {error}")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    program = Path(arguments[0])
    if not program.exists():
        sys.exit(f"veneer: there is no program {program}.")
    sys.argv = arguments
    sys.path[0] = str(program.resolve().parent)
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

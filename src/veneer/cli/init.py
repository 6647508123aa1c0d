"""`veneer init`: a run file to start from."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("run.yaml"),
) -> None:
    """Write a commented run.yaml with every setting and its default.

    Example: [bold]veneer init[/bold], edit model and data.train, then [bold]veneer train run.yaml[/bold].
    """
    from veneer.errors import RunError
    from veneer.train.template import TEMPLATE

    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(TEMPLATE)
    except FileExistsError:
        raise RunError(f"{file} exists already and is left as it is. Name another: veneer init other.yaml") from None
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror}") from None
    typer.echo(f"Wrote {file}. Set model and data.train in it, then: veneer train {file}")

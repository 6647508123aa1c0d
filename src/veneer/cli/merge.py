"""`veneer merge`: a plain model that needs no adapter any more."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, or a hub id.")],
    into: Annotated[Path, typer.Option(help="A new folder for the merged model and its tokenizer.")],
    base: Annotated[str | None, typer.Option(help="The model to merge into, if not the one the adapter names.")] = None,
) -> None:
    """Write the model with the adapter merged into its weights.

    Example: [bold]veneer merge runs/first/adapter --into runs/first/merged[/bold]

    The folder appears complete or not at all, and loads with transformers alone.
    """
    from veneer.train.folders import refuse_non_empty, refuse_unwritable

    refuse_non_empty(into, hint="Name a new folder with --into.")
    refuse_unwritable(into)
    from veneer.storage.write import write_folder
    from veneer.train.adapted import load_adapted
    from veneer.train.quiet import quiet

    with quiet():
        loaded = load_adapted(adapter, base=base, dtype="stored")
        merged = loaded.model.merge_and_unload()

        def fill(stage: Path) -> None:
            merged.save_pretrained(str(stage))
            loaded.tokenizer.save_pretrained(str(stage))

        write_folder(into, fill)
    typer.echo(f"Merged {adapter} into {loaded.base}: {into}")
    typer.echo(f"Next: veneer chat {into}")

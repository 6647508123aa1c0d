"""`veneer merge`: a plain model that needs no adapter any more."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.train.adapted import Adapted

_TOKENS = 256  # of a sample at once


def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, or a hub id.")],
    into: Annotated[Path, typer.Option(help="A new folder for the merged model and its tokenizer.")],
    base: Annotated[str | None, typer.Option(help="The model to merge into, if not the one the adapter names.")] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="If the base's files are quantised: round again, and say what is lost.")
    ] = False,
    sample: Annotated[
        Path | None, typer.Option(help="With --requantize: a text, to tell how far the answers to it move.")
    ] = None,
) -> None:
    """Write the model with the adapter merged into its weights.

    Example: [bold]veneer merge runs/first/adapter --into runs/first/merged[/bold]

    The base is loaded in the numbers of its files, also if the adapter was trained over a quantised one. The folder
    appears complete or not at all, and loads with transformers alone.
    """
    from veneer.train.folders import refuse_non_empty, refuse_unwritable

    refuse_non_empty(into, hint="Name a new folder with --into.")
    refuse_unwritable(into)
    text = _sample(sample, requantize)
    from veneer.storage.write import write_folder
    from veneer.train.adapted import load_adapted
    from veneer.train.quiet import quiet

    with quiet():
        loaded = load_adapted(adapter, base=base, dtype="stored")
        merged, report = _requantized(loaded, text) if requantize else (_merged(loaded), None)

        def fill(stage: Path) -> None:
            _save(merged, stage)
            loaded.tokenizer.save_pretrained(str(stage))

        write_folder(into, fill)
    if report is not None:
        typer.echo(report)
    typer.echo(f"Merged {adapter} into {loaded.base}: {into}")
    typer.echo(f"Next: veneer chat {into}")


def _sample(file: Path | None, requantize: bool) -> str | None:
    from veneer.errors import RunError

    if file is None:
        return None
    if not requantize:
        raise RunError("--sample goes with --requantize: nothing else changes the answers.")
    text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise RunError(f"{file} is empty: there is no text to try the merged model on.")
    return text


def _merged(loaded: "Adapted") -> Any:
    """The merged model. Raises RunError if the files of the base are quantised."""
    from veneer.errors import RunError, bullet_list
    from veneer.model.requantization import has_quantised_sites

    if has_quantised_sites(loaded.model.bare):
        ways = [
            "--base MODEL      the unquantised model it was made from: nothing is lost",
            "--requantize      round the merged weights again, and be told how much of the adapter is lost",
        ]
        raise RunError(bullet_list(f"The files of {loaded.base} are quantised, so merging needs a word more:", ways))
    return loaded.model.merge_and_unload()


def _requantized(loaded: "Adapted", text: str | None) -> tuple[Any, str]:
    """The merged model, rounded again, and what that cost in words."""
    from veneer.errors import VeneerWarning

    report = loaded.model.requantization_report(None if text is None else _rows(loaded.tokenizer, text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # which says what the report does
        return loaded.model.merge_and_unload(requantize=True), str(report)


def _save(merged: Any, stage: Path) -> None:
    """Write a model. Raises RunError if transformers has no way to write its kind of quantised weights."""
    from veneer.errors import RunError

    try:
        merged.save_pretrained(str(stage))
    except NotImplementedError:  # torchao's, read from files: they are written as they are, not turned back first
        merged.save_pretrained(str(stage), save_original_format=False)
    except ValueError as error:
        if "not serializable" not in str(error):
            raise
        raise RunError(f"Merged, and not written: {str(error).partition(' - ')[0]}") from error


def _rows(tokenizer: Any, text: str) -> dict[str, Any]:
    """A text's tokens in rows of one length; the last row is filled up with the end of the one before."""
    import torch

    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    length = min(_TOKENS, len(ids))
    starts = [*range(0, len(ids) - length, length), len(ids) - length]
    return {"input_ids": torch.stack([ids[start : start + length] for start in starts])}

"""`veneer push`: an adapter folder to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    to: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made if there is none.")] = None,
    message: Annotated[str | None, typer.Option(help="What the commit says.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the files to the owner.")] = False,
    token_from: Annotated[
        str | None, typer.Option("--token-from-env", metavar="VARIABLE", help="Where to read the token.")
    ] = None,
) -> None:
    """Upload an adapter folder to the Hugging Face hub, with a model card, in one commit.

    Example: [bold]veneer push runs/first/adapter user/name --private[/bold]

    The token is that of `hf auth login`, or HF_TOKEN. What you wrote into the repository's README.md stays.
    """
    import os

    from veneer.errors import RunError
    from veneer.model.push import push_folder
    from veneer.train.folders import refuse_run_folder

    refuse_run_folder(str(adapter))
    if token_from is not None and not os.environ.get(token_from):
        raise RunError(f"There is no environment variable {token_from}, so there is no token.")
    done = push_folder(
        adapter,
        to,
        commit_message=message,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        token=os.environ[token_from] if token_from else None,
    )
    typer.echo(f"Pushed {adapter}: {done.pr_url or done.commit_url}")

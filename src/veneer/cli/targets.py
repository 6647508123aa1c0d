"""`veneer targets`: which layers of a model can be adapted, and how many parameters that would train."""

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veneer.targets import Preview

PLAIN_NAME = re.compile(r"[\w.-]+")


def targets(
    model: Annotated[str, typer.Argument(help="A hub id, or a folder with a config.json.")],
    target: Annotated[
        list[str] | None,
        typer.Option(help="A layer name to adapt, such as q_proj; may be given several times. Or one pattern."),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(help="A parameter to adapt that is no layer's, such as experts.gate_up_proj; also several times."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Show what an adapter would be attached to. Loads no weights.

    Example: [bold]veneer targets HuggingFaceTB/SmolLM2-135M --target q_proj --target v_proj --rank 16[/bold]

    Without --target it shows every linear layer except the output head, as target_modules: all-linear means; with
    --parameter alone, those parameters.
    """
    from rich.console import Console

    from veneer import LoraConfig
    from veneer.targets import preview
    from veneer.train.load import skeleton
    from veneer.train.quiet import quiet

    config = LoraConfig(r=rank, target_modules=_names(target, parameter), target_parameters=parameter or None)
    with quiet():
        bare = skeleton(model, revision=revision)
    _show(Console(), type(bare).__name__, preview(bare, config), rank)


def _names(target: list[str] | None, parameter: list[str] | None) -> list[str] | str:
    """What --target means: names, a single regular expression, or the one word for every linear layer."""
    if parameter and not target:
        return []
    if not target or target == ["all-linear"]:
        return "all-linear"
    return target[0] if len(target) == 1 and not PLAIN_NAME.fullmatch(target[0]) else list(target)


def _show(console, name: str, found: "Preview", rank: int) -> None:
    from rich.table import Table

    groups: dict[str, list] = defaultdict(list)
    for site in found.sites:
        groups[site.name.rpartition(".")[2]].append(site)
    table = Table(title=f"{name}, rank {rank}", title_justify="left")
    for column in ("name", "layers", "kind", "out x in", "trained"):
        table.add_column(column, justify="left" if column in ("name", "kind") else "right")
    for leaf, sites in groups.items():
        shapes = sorted({site.shape for site in sites})
        table.add_row(
            leaf,
            str(len(sites)),
            ", ".join(sorted({site.kind.name for site in sites})),
            ", ".join(f"{out_features} x {in_features}" for out_features, in_features in shapes),
            f"{sum(site.parameters for site in sites):,}",
        )
    console.print(table)
    adapted = {site.path.rpartition(".")[2] for site in found.sites}
    others = [f"{leaf} ({count})" for leaf, count in found.linear_layers.items() if leaf not in adapted]
    named = {f"{site.path.rpartition('.')[2]}.{site.parameter}" for site in found.sites}
    others += [f"{name} ({count}, --parameter)" for name, count in found.stacks.items() if name not in named]
    if others:
        console.print(f"Not targeted: {', '.join(others)}", highlight=False, soft_wrap=True)
    share = 100 * found.trainable / found.total
    console.print(f"{found.trainable:,} of {found.total:,} parameters trained ({share:.2f} %)", highlight=False)

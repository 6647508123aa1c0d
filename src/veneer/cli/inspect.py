"""`veneer inspect`: what an adapter's files say. Reads headers, not weights, and does not load torch."""

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.storage.header import Header

FACTORS_A = (".lora_A.weight", ".lora_embedding_A")
FACTORS_B = (".lora_B.weight", ".lora_embedding_B")
MAGNITUDE = (".lora_magnitude_vector",)
SHOWN_FIELDS = (
    "task_type",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "lora_dropout",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
)
OUR_METADATA = ("sha256", "veneer_trained_with")  # for the loader, which compares them


@dataclass
class Group:
    """The layers of one name: their ranks, their shapes (out, in) and how many numbers are theirs."""

    paths: set[str] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    outs: set[int] = field(default_factory=set)
    ins: set[int] = field(default_factory=set)
    parameters: int = 0


def inspect(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, or a hub id.")],
) -> None:
    """Show what an adapter is: its model, ranks, targets, size.

    Example: [bold]veneer inspect runs/first/adapter[/bold]
    """
    from rich.console import Console

    from veneer.storage.adapter_file import WEIGHTS_FILE, read_config, read_weights_header
    from veneer.storage.hub import adapter_folder
    from veneer.train.folders import refuse_run_folder

    refuse_run_folder(adapter)
    folder = adapter_folder(adapter)
    config = read_config(folder)
    header = read_weights_header(folder)
    size = (folder / WEIGHTS_FILE).stat().st_size
    console = Console()
    _show_facts(console, config, header, size)
    _show_layers(console, header)


def group_tensors(header: "Header") -> tuple[dict[str, Group], dict[str, int]]:
    """The adapted layers by name, and the other tensors (saved modules, biases) with how many numbers they hold."""
    groups: dict[str, Group] = defaultdict(Group)
    others: dict[str, int] = {}
    for name, info in header.tensors.items():
        suffix = next((suffix for suffix in (*FACTORS_A, *FACTORS_B, *MAGNITUDE) if name.endswith(suffix)), None)
        if suffix is None:
            others[name] = prod(info.shape)
            continue
        path = name.removesuffix(suffix)
        group = groups[path.rpartition(".")[2]]
        group.paths.add(path)
        group.parameters += prod(info.shape)
        if suffix in FACTORS_A:
            group.ranks.add(info.shape[0])
            group.ins.add(info.shape[1])
        if suffix in FACTORS_B:
            group.outs.add(info.shape[0])
    return dict(groups), others


def _show_facts(console, config: dict[str, Any], header: "Header", size: int) -> None:
    from rich.table import Table
    from rich.text import Text

    rank, alpha = config.get("r"), config.get("lora_alpha")
    parameters = sum(prod(info.shape) for info in header.tensors.values())
    dtypes = ", ".join(sorted({info.dtype for info in header.tensors.values()}))
    facts: list[tuple[str, Any]] = [
        ("model", config.get("base_model_name_or_path")),
        ("revision", config.get("revision")),
        ("rank", rank),
        ("alpha", alpha),
        ("scale", _scale(rank, alpha, rslora=config.get("use_rslora") is True)),
        *((name, config.get(name)) for name in SHOWN_FIELDS),
        ("parameters", f"{parameters:,}"),
        ("tensors", f"{len(header.tensors):,} ({dtypes})"),
        ("file", f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"),
        *((f"metadata {key}", value) for key, value in header.metadata.items() if key not in OUR_METADATA),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value not in (None, {}, []):
            table.add_row(name, Text(_plain(value)))
    console.print(table)


def _show_layers(console, header: "Header") -> None:
    from rich.table import Table

    groups, others = group_tensors(header)
    table = Table()
    for column in ("name", "layers", "rank", "out x in", "parameters"):
        justify = "left" if column == "name" else "right"
        table.add_column(column, justify=justify, overflow="fold" if column == "name" else "ellipsis")
    for leaf, group in groups.items():
        shape = f"{_all(group.outs)} x {_all(group.ins)}"
        table.add_row(leaf, str(len(group.paths)), _all(group.ranks), shape, f"{group.parameters:,}")
    for name, count in others.items():
        table.add_row(f"{name.removeprefix('base_model.model.')} (whole)", "1", "", "", f"{count:,}")
    console.print(table)


def _scale(rank: Any, alpha: Any, *, rslora: bool) -> str | None:
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        return None
    return f"{alpha / (sqrt(rank) if rslora else rank):g}"


def _all(numbers: set[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)

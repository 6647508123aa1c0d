"""`veneer inspect`: what an adapter's files say. Reads headers, not weights, and does not load torch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.model.contents import Contents
    from veneer.storage.header import Header

SHOWN_FIELDS = (
    "task_type",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "lora_dropout",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
)
SHOWN_IF_SET = ("lora_bias", "ensure_weight_tying", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
OUR_METADATA = ("crc32", "sha256", "veneer_trained_with")  # for the loader, which compares them


def inspect(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, or a hub id.")],
) -> None:
    """Show what an adapter is: its model, ranks, targets, size.

    Example: [bold]veneer inspect runs/first/adapter[/bold]
    """
    from rich.console import Console

    from veneer.model.contents import contents_of
    from veneer.storage.adapter_file import WEIGHTS_FILE, read_config, read_weights_header
    from veneer.storage.hub import adapter_folder
    from veneer.train.folders import refuse_run_folder

    refuse_run_folder(adapter)
    folder = adapter_folder(adapter)
    config = read_config(folder)
    header = read_weights_header(folder)
    size = (folder / WEIGHTS_FILE).stat().st_size
    console = Console()
    contents = contents_of(header.tensors, config)
    _show_facts(console, config, header, contents, size)
    _show_layers(console, contents)


def _show_facts(console, config: dict[str, Any], header: "Header", contents: "Contents", size: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from veneer.model.contents import scale_of

    rank, alpha = config.get("r"), config.get("lora_alpha")
    scales = {scale for group in contents.groups.values() for scale in group.scales}
    plain = scale_of(rank, alpha, rslora=config.get("use_rslora") is True)
    tied = " (those of tied modules in each)" if config.get("ensure_weight_tying") else ""
    dtypes = ", ".join(sorted({info.dtype for info in header.tensors.values()}))
    facts: list[tuple[str, Any]] = [
        ("model", config.get("base_model_name_or_path")),
        ("revision", config.get("revision")),
        ("rank", rank),
        ("alpha", alpha),
        ("scale", _all(scales) or (None if plain is None else _all([plain]))),
        *((name, config.get(name)) for name in SHOWN_FIELDS),
        *((name, config[name]) for name in SHOWN_IF_SET if config.get(name)),
        ("parameters", f"{contents.parameters:,}{tied}"),
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


def _show_layers(console, contents: "Contents") -> None:
    from rich.table import Table

    table = Table()
    for column in ("name", "layers", "rank", "out x in", "scale", "parameters"):
        justify = "left" if column == "name" else "right"
        table.add_column(column, justify=justify, overflow="fold" if column == "name" else "ellipsis")
    for leaf, group in contents.groups.items():
        shape = f"{_all(group.outs)} x {_all(group.ins)}"
        count = "" if group.matrices <= {1} else f" x {_all(group.matrices)}"
        ranks = f"{_all(group.ranks)}{count}"
        table.add_row(leaf, str(len(group.paths)), ranks, shape, _all(group.scales), f"{group.parameters:,}")
    for lines in (contents.rows, contents.whole, contents.copies):
        for name, (tensors, numbers) in lines.items():
            table.add_row(name, str(tensors), "", "", "", f"{numbers:,}")
    console.print(table)


def _all(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.4g}" if isinstance(number, float) else str(number) for number in sorted(numbers))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)

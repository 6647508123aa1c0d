"""`veneer inspect`: what an adapter's files say. Reads headers, not weights, and does not load torch."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.storage.header import Header

FACTORS_A = (".lora_A.weight", ".lora_embedding_A")
FACTORS_B = (".lora_B.weight", ".lora_embedding_B")
BESIDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_B.bias", ".lora_embedding_B.bias")
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
COPIES = (".base_layer.weight", ".token_adapter.base_layer.weight")  # of the base, for a reader that compares
WRAPPED = ".base_layer"
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
OUR_METADATA = ("sha256", "veneer_trained_with")  # for the loader, which compares them


@dataclass
class Group:
    """The layers of one name: their ranks, scales and shapes (out, in), and how many numbers are theirs.

    matrices  how many each holds: 1, or the number of experts stacked in a parameter
    """

    paths: set[str] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    scales: set[float] = field(default_factory=set)
    matrices: set[int] = field(default_factory=set)
    outs: set[int] = field(default_factory=set)
    ins: set[int] = field(default_factory=set)
    parameters: int = 0


@dataclass
class Contents:
    """What a file holds: adapted layers by name, then other tensors in one line for each name: (how many, numbers).

    whole   modules and biases trained in full; rows: embeddings of which rows are; copies: weights of the base
    """

    groups: dict[str, Group]
    whole: dict[str, tuple[int, int]]
    rows: dict[str, tuple[int, int]]
    copies: dict[str, tuple[int, int]]

    @property
    def parameters(self) -> int:
        """How many numbers were trained; copies of the base were not."""
        others = [*self.whole.values(), *self.rows.values()]
        return sum(group.parameters for group in self.groups.values()) + sum(numbers for _, numbers in others)


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
    contents = contents_of(header, config)
    _show_facts(console, config, header, contents, size)
    _show_layers(console, contents)


def contents_of(header: "Header", config: Mapping[str, Any]) -> Contents:
    """The tensors of a file, told apart by their names and by what the config says of the layers."""
    found = Contents(defaultdict(Group), {}, {}, {})
    for name, info in header.tensors.items():
        numbers = prod(info.shape)
        suffix = next((end for end in (*FACTORS_A, *FACTORS_B, *BESIDE) if name.endswith(end)), None)
        if suffix is not None:
            _add_to_group(found.groups, name.removesuffix(suffix), suffix, info.shape, config)
        elif name.endswith(TOKEN_ROWS):
            _add_line(found.rows, f"{name.removesuffix(TOKEN_ROWS)} ({info.shape[0]} rows)", numbers)
        elif name.endswith(COPIES):
            _add_line(found.copies, f"{name} (copy of the base)", numbers)
        else:
            _add_line(found.whole, f"{name} (whole)", numbers)
    return found


def _add_to_group(
    groups: dict[str, Group], path: str, suffix: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> None:
    stacked = _is_parameter(path, config)
    group = groups[_parameter_name(path, config) if stacked else path.rpartition(".")[2]]
    group.paths.add(path)
    group.parameters += prod(shape)
    if suffix in FACTORS_A:
        group.ins.add(prod(shape[1:]))
        rank = _rank_of_each(shape[0], config) if stacked else shape[0]
        if rank is not None:  # else a pattern sets it, for a name that the file does not say
            group.ranks.add(rank)
            group.matrices.add(shape[0] // rank)
        if (scale := _scale(rank, _alpha(path, config), rslora=config.get("use_rslora") is True)) is not None:
            group.scales.add(scale)
    if suffix in FACTORS_B:
        group.outs.add(shape[0])


def _is_parameter(path: str, config: Mapping[str, Any]) -> bool:
    """Whether an adapter at this path lies on a parameter (target_parameters), not on a layer."""
    from veneer.config.patterns import matches, pattern_fault

    path = _short(path)
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    targets = config.get("target_modules") or []
    if not config.get("target_parameters"):
        return False
    if isinstance(targets, str):
        return pattern_fault(targets) is None and not matches(targets, path)
    return not any(path == name or path.endswith(f".{name}") for name in map(str, targets))


def _parameter_name(path: str, config: Mapping[str, Any]) -> str:
    """What the adapters on a parameter are called. Those of one module nest in a file, the last one outside."""
    owner = path
    while owner.endswith(WRAPPED):
        owner = owner.removesuffix(WRAPPED)
    entries = map(str, config["target_parameters"])
    names = {
        name
        for name_of_owner, _, name in (entry.rpartition(".") for entry in entries)
        if f".{owner}".endswith(f".{name_of_owner}")
    }
    place = (len(path) - len(owner)) // len(WRAPPED) + 1
    short = owner.rpartition(".")[2]
    return f"{short}.{names.pop()}" if len(names) == 1 else f"{short} (parameter {place} from the end)"


def _rank_of_each(rows: int, config: Mapping[str, Any]) -> int | None:
    """The rank of each of the matrices that are stacked in a parameter; None if the config alone does not say."""
    rank = config.get("r")
    known = isinstance(rank, int) and rank > 0 and rows % rank == 0
    return rank if known and not config.get("rank_pattern") and not config.get("alpha_pattern") else None


def _alpha(path: str, config: Mapping[str, Any]) -> Any:
    from veneer.config.patterns import matches_end, pattern_fault

    patterns = config.get("alpha_pattern")
    for key, alpha in patterns.items() if isinstance(patterns, dict) else ():
        if pattern_fault(key) is None and matches_end(key, _short(path)):
            return alpha
    return config.get("lora_alpha")


def _add_line(lines: dict[str, tuple[int, int]], name: str, numbers: int) -> None:
    """Count a tensor among those of the same name in other layers."""
    name = re.sub(r"\.\d+(?=\.)", ".*", _short(name))
    count, before = lines.get(name, (0, 0))
    lines[name] = count + 1, before + numbers


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _show_facts(console, config: dict[str, Any], header: "Header", contents: Contents, size: int) -> None:
    from rich.table import Table
    from rich.text import Text

    rank, alpha = config.get("r"), config.get("lora_alpha")
    scales = {scale for group in contents.groups.values() for scale in group.scales}
    plain = _scale(rank, alpha, rslora=config.get("use_rslora") is True)
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


def _show_layers(console, contents: Contents) -> None:
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


def _scale(rank: Any, alpha: Any, *, rslora: bool) -> float | None:
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        return None
    return alpha / (sqrt(rank) if rslora else rank)


def _all(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.4g}" if isinstance(number, float) else str(number) for number in sorted(numbers))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)

"""The model card of an adapter: what it is, what it was trained on, how to load it, said from its own files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from veneer._version import __version__
from veneer.layers.attach import Adapters
from veneer.layers.saved_module import Copies
from veneer.layers.token_rows import RowsByAdapter
from veneer.model.card_loading import how_to_load
from veneer.model.contents import Contents, contents_of, scale_of
from veneer.model.report import numbers_in
from veneer.storage.adapter_file import CHECKSUM, read_config, read_weights_header
from veneer.storage.card import CARD_FILE, may_be_written, read_card, section, updated, with_metadata
from veneer.storage.header import Header
from veneer.storage.hub import is_hub_id
from veneer.storage.write import write_file

_OURS = (Adapters, Copies, RowsByAdapter)
ORDER = ("adapter", "training", "scores", "use")
PIPELINES = {"CAUSAL_LM": "text-generation"}  # of the other tasks a tag would be a guess
# Settings that a reader is told if they are not at the value that means "not used".
_SETTINGS = {
    "lora_dropout": ("dropout", 0),
    "bias": ("trained biases", "none"),
    "modules_to_save": ("trained in full", None),
    "trainable_token_indices": ("trained tokens", None),
    "rank_pattern": ("rank by name", {}),
    "alpha_pattern": ("alpha by name", {}),
    "layers_to_transform": ("layers adapted", None),
    "layer_replication": ("replicated layers", None),
    "alora_invocation_tokens": ("acts after the tokens", None),
}


@dataclass(frozen=True)
class Base:
    """What is known of the base model beyond the adapter's files: how many numbers it has, whose class it is, tags."""

    numbers: int | None = None
    of_transformers: bool = False
    tags: tuple[str, ...] = ()
    quantised: str | None = None


def base_of(model: nn.Module) -> Base:
    """What a card says of the model under an adapter."""
    config: Any = getattr(model, "config", None)
    quantised: Any = getattr(config, "quantization_config", None)
    method = getattr(quantised, "quant_method", None)
    return Base(
        numbers=_base_numbers(model),
        of_transformers=type(model).__module__.startswith("transformers.") or hasattr(config, "model_type"),
        tags=tuple(getattr(model, "model_tags", None) or ()),
        quantised=None if method is None else str(getattr(method, "value", method)),
    )


def _base_numbers(model: nn.Module) -> int:
    """How many numbers the base has, each counted once, whatever adapters lie over it."""
    found, modules = {}, [model]
    for module in modules:
        found |= {id(value): numbers_in(value) for value in module._parameters.values() if value is not None}
        modules += [child for child in module._modules.values() if child is not None and not isinstance(child, _OURS)]
    return sum(found.values())


def write_card(
    folder: Path,
    *,
    before: Path | None = None,
    header: Header | None = None,
    into: Path | None = None,
    base: Base | None = None,
    location: str | None = None,
    adapters: Sequence[str] = ("",),
    tags: Iterable[str] = (),
    said: Mapping[str, str] | None = None,
) -> None:
    """Write README.md beside an adapter, or renew the parts of it that are ours.

    before    a folder whose README.md is carried on, if it is another one than `folder`, which is being filled then
    header    of the weights of the adapter described, if it was read already
    into      where it goes, if not beside the adapter
    location  what the adapter is loaded by: a hub id, or a folder
    adapters  subfolders of the adapters it speaks of, the one described first; "" is the folder itself
    said      more sections by name ("training", "scores"), as Markdown; they stay until the weights change

    A README.md that cannot be read, or is a link, is left alone.
    """
    old = folder if before is None else before
    if not may_be_written(old):
        return
    described = folder / adapters[0]
    config, header = read_config(described), read_weights_header(described) if header is None else header
    of = header.metadata.get(CHECKSUM)
    contents = contents_of(header.tensors, config)
    sections = {
        "adapter": section("adapter", what_it_is(config, contents, base, adapters)),
        "use": section("use", how_to_load(config, contents, _loaded_base(config), location, adapters[0])),
        **{name: section(name, text, of=of) for name, text in (said or {}).items()},
    }
    metadata = metadata_of(config, base, tags)
    text = read_card(old)
    if text is None:
        text = with_metadata(_new(config, sections), metadata)
    else:
        text = updated(text, metadata, sections, of=of, order=ORDER)
    if before is None or into is not None:
        write_file((into or folder) / CARD_FILE, text.encode())
    else:  # flushed with the folder
        (folder / CARD_FILE).write_bytes(text.encode())


def metadata_of(config: Mapping[str, Any], base: Base | None, tags: Iterable[str] = ()) -> dict[str, Any]:
    """The metadata that lets the hub file an adapter under its base model, as PEFT writes it."""
    name = base_on_hub(config)
    task = str(config.get("task_type"))
    of_transformers = task in PIPELINES or bool(base and base.of_transformers)
    all_tags = [
        *([f"base_model:adapter:{name}"] if name else []),
        "dora" if config.get("use_dora") else None,
        "lora",
        "transformers" if of_transformers else None,
        "veneer",
        *(base.tags if base else ()),
        *tags,
    ]
    return {
        **({"base_model": name} if name else {}),
        "library_name": "peft",  # the hub's name for files of this format
        **({"pipeline_tag": PIPELINES[task]} if task in PIPELINES else {}),
        "tags": list(dict.fromkeys(tag for tag in all_tags if tag)),
    }


def base_on_hub(config: Mapping[str, Any]) -> str | None:
    """The hub id of the base model; None if the config names none, or a folder, which nobody else has."""
    name = config.get("base_model_name_or_path")
    known = isinstance(name, str) and is_hub_id(name) and not os.path.exists(name)
    return name if known else None


def shown_base(config: Mapping[str, Any]) -> str:
    """The base model as a reader may see it: of a folder its name alone."""
    name = config.get("base_model_name_or_path")
    if not name:
        return "a model that the adapter does not name"
    return f"`{base_on_hub(config) or Path(str(name)).name}`"


def _loaded_base(config: Mapping[str, Any]) -> str:
    """The base model as a command names it; a folder of this machine as the folder it is elsewhere."""
    name = Path(str(config.get("base_model_name_or_path") or "the-base-model")).name
    return base_on_hub(config) or f"path/to/{name}"


def what_it_is(
    config: Mapping[str, Any], contents: Contents, base: Base | None, adapters: Sequence[str] = ("",)
) -> str:
    """The sentences and the table that say what an adapter is, as Markdown."""
    base_name = base_on_hub(config)
    linked = f"[{base_name}](https://huggingface.co/{base_name})" if base_name else shown_base(config)
    revision = f" (revision `{config['revision']}`)" if config.get("revision") else ""
    lines = [
        f"A {method(config)} adapter for {linked}{revision}. It holds {contents.parameters:,} trained numbers"
        f"{_share(contents, base)}; the model itself is unchanged and not part of these files."
    ]
    if len(adapters) > 1 or adapters[0]:
        names = ", ".join(f"`{name or '.'}`" for name in adapters)
        lines += ["", f"Folders with an adapter: {names}. Described here: `{adapters[0] or '.'}`."]
    return "\n".join([*lines, "", table("setting", "value", _facts(config, contents, base))])


def method(config: Mapping[str, Any]) -> str:
    """What the kind of adapter is called."""
    kinds = (
        ("use_dora", "DoRA"),
        ("alora_invocation_tokens", "activated LoRA"),
        ("use_rslora", "rank-stabilised LoRA"),
    )
    return " + ".join(name for field, name in kinds if config.get(field)) or "LoRA"


def table(left: str, right: str, rows: Iterable[tuple[str, object]]) -> str:
    """A Markdown table of two columns; rows whose value is None are left out."""
    body = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows if value is not None]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *body])


def _facts(config: Mapping[str, Any], contents: Contents, base: Base | None) -> list[tuple[str, object]]:
    groups = contents.groups.values()
    ranks = sorted({rank for group in groups for rank in group.ranks})
    scales = sorted({scale for group in groups for scale in group.scales})
    plain = scale_of(config.get("r"), config.get("lora_alpha"), rslora=config.get("use_rslora") is True)
    rows: list[tuple[str, object]] = [
        ("rank (`r`)", _numbers(ranks) or config.get("r")),
        ("`lora_alpha`", config.get("lora_alpha")),
        ("scale of the update", _numbers(scales) or (None if plain is None else f"{plain:.4g}")),
        ("adapted", ", ".join(f"`{name}` × {len(group.paths)}" for name, group in contents.groups.items()) or None),
        ("task", config.get("task_type")),
    ]
    for field, (label, unused) in _SETTINGS.items():
        if config.get(field) not in (unused, None, [], {}):
            rows.append((label, _plain(config[field])))
    start = config.get("init_lora_weights", True)
    rows.append(("started from", None if start is True else f"`{start}`"))
    rows.append(("base was quantised", base.quantised if base else None))
    rows.append(("written by", f"Veneer {__version__}, in PEFT's format"))
    return rows


def _share(contents: Contents, base: Base | None) -> str:
    if base is None or not base.numbers:
        return ""
    return f", {100 * contents.parameters / base.numbers:.2g} % of the {base.numbers:,} of its base"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"`{key}`: {inner}" for key, inner in value.items())
    if isinstance(value, list):
        shown = ", ".join(f"`{one}`" for one in value[:8])
        return shown if len(value) <= 8 else f"{shown} and {len(value) - 8} more"
    return str(value)


def _new(config: Mapping[str, Any], sections: Mapping[str, str]) -> str:
    parts = [
        f"# {method(config)} adapter for {shown_base(config).strip('`').rpartition('/')[2]}",
        "",
        "\n".join(sections[name] for name in ORDER if name in sections),
        "## Licence\n\nNot stated yet: add a line `license:` to the metadata at the top, and mind the licence of the "
        "base model and of the data.\n",
    ]
    return "\n".join(parts)

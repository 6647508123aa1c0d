"""README.md as a model card: metadata between two lines of ---, then text, of which some sections are ours.

A section of ours stands between two marks and is written anew; everything else belongs to the reader who wrote it and
stays byte for byte. Metadata that is there stays too; what is missing is added.

<!-- veneer:adapter -->
…
<!-- veneer:end -->
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD_FILE = "README.md"
MAX_CARD_BYTES = 4 << 20
_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SECTION = re.compile(
    r"<!-- veneer:(?P<name>\w+)(?: of (?P<of>\w+))? -->\r?\n(?P<text>.*?)<!-- veneer:end -->\r?\n?", re.DOTALL
)
ALWAYS = ("adapter", "use")  # sections of a new card; a reader who took one out does not want it
_END = "<!-- veneer:end -->\n"


def read_card(folder: Path) -> str | None:
    """The text of the README.md of a folder; None if there is none, or none that can be kept up to date."""
    file = folder / CARD_FILE
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_CARD_BYTES:
        return None
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def may_be_written(folder: Path) -> bool:
    """Whether a card may be put into the folder: none is there, or one that can be read."""
    return not (folder / CARD_FILE).is_symlink() and (
        not (folder / CARD_FILE).exists() or read_card(folder) is not None
    )


def section(name: str, text: str, *, of: str | None = None) -> str:
    """A section of ours. `of`: the checksum of the weights it speaks of; it goes when they change."""
    mark = f"<!-- veneer:{name}{f' of {of}' if of else ''} -->"
    return f"{mark}\n{text.strip()}\n{_END}"


def updated(
    card: str, metadata: Mapping[str, Any], sections: Mapping[str, str], *, of: str | None, order: tuple[str, ...]
) -> str:
    """The card with sections renewed and metadata added; a card without a section of ours keeps its text.

    sections  {name: section}; one that the card lacks comes behind those before it in `order`
    of        the checksum of the weights; sections that speak of others go
    """
    ours = _SECTION.search(card) is not None
    body = _SECTION.sub(lambda found: _renewed(found, sections, of), card) if ours else card
    for name in order if ours else ():
        if name in sections and f"<!-- veneer:{name}" not in body and name not in ALWAYS:
            body = _inserted(body, sections[name], before=order[: order.index(name)])
    return with_metadata(body, metadata, ours=ours)


def _renewed(found: re.Match[str], sections: Mapping[str, str], of: str | None) -> str:
    if (text := sections.get(found["name"])) is not None:
        return text
    return "" if found["of"] and found["of"] != of else found[0]


def _inserted(body: str, text: str, *, before: tuple[str, ...]) -> str:
    """The body with a section behind the last of those named."""
    ends = [found.end() for found in _SECTION.finditer(body) if found["name"] in before]
    place = max(ends, default=len(body))
    return f"{body[:place]}\n{text}{body[place:]}"


def with_metadata(card: str, wanted: Mapping[str, Any], *, ours: bool = True) -> str:
    """The card with metadata laid in. Tags are united; what else is there stays, but for `library_name` and, in a card
    of ours, `base_model`: what the files are is known here. Metadata that is no YAML is left as it is.
    """
    import yaml

    found = _FRONT.match(card)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return card
    data = {} if data is None else data
    if not isinstance(data, dict):
        return card
    tags = data.get("tags") or []
    tags = tags if isinstance(tags, list) else [tags]
    known = {"library_name", *(["base_model"] if ours else [])}
    new = {
        **data,
        **{key: value for key, value in wanted.items() if data.get(key) in (None, "", []) or key in known},
        "tags": [*tags, *(tag for tag in wanted.get("tags", ()) if tag not in tags)],
    }
    if new == data:
        return card
    body = card[found.end() :] if found else f"\n{card}"
    return f"---\n{yaml.safe_dump(new, sort_keys=False, allow_unicode=True)}---\n{body}"

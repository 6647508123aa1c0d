"""A thousand real US addresses with their parts, as they come with Veneer (MIT, see the licence beside them)."""

import json
from importlib.resources import files
from typing import Any

PARTS = ("number", "street", "unit", "city", "state", "zip", "po_box", "name")


def rows(split: str, count: int | None = None) -> list[dict[str, Any]]:
    """The first rows of "train" or "test".

    {"prompt": "Parse this US address into JSON: 75 Main St, Ames, IA", "completion": '{"number": "75", …}',
     "address": "75 Main St, Ames, IA", "parts": {"number": "75", …}}
    """
    text = (files("veneer") / "train" / "addresses" / f"{split}.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()[:count]]
    for row in found:
        row["address"] = row["prompt"].partition(": ")[2]
        row["parts"] = json.loads(row["completion"])
    return found


def tagged(row: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The words of an address, and for each the number of the part it belongs to: 0 none, 1 number, 2 street, …"""
    words = row["address"].split()
    tags = [0] * len(words)
    for part, value in row["parts"].items():
        wanted = value.split()
        for start in range(len(words) - len(wanted) + 1):
            here = range(start, start + len(wanted))
            if all(words[at].strip(",.;()") == want.strip(",.;()") for at, want in zip(here, wanted, strict=True)):
                for at in here:
                    tags[at] = 1 + PARTS.index(part)
                break
    return words, tags

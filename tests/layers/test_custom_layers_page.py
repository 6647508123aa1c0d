"""docs/custom-layers.md: what it shows runs."""

import re
from pathlib import Path

import torch

from veneer.layers.kinds import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "custom-layers.md").read_text(encoding="utf-8")


def test_the_example_runs(monkeypatch):
    before = dict(KINDS)
    torch.manual_seed(0)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
    names: dict[str, object] = {"__name__": "custom_layers"}
    try:
        exec(compile(code, "custom-layers.md", "exec"), names)
    finally:
        for name in KINDS.keys() - before.keys():
            del KINDS[name]
    assert "expected" in names

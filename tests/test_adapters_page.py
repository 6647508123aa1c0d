"""docs/adapters.md: its blocks run, in order."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "adapters_page"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"block {number} of docs/adapters.md", "exec"), names)
    assert "trainable params" in capsys.readouterr().out

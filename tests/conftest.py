"""The tiny chat model and its data, for the rooms that train and for those that command them.

PEFT is the oracle of many tests. Where it is not installed, the files that ask it are left out, and the others run.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

_ASKS_PEFT = re.compile(r"^\s*(from|import) (peft|parity|init\.oracle|optimizers\.steps)\b", re.MULTILINE)

collect_ignore = [
    str(file.relative_to(Path(__file__).parent))
    for file in Path(__file__).parent.rglob("test_*.py")
    if find_spec("peft") is None and _ASKS_PEFT.search(file.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny chat model and its tokenizer."""
    from train.tiny_chat import save_to

    return save_to(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Twelve rows of prompt and completion."""
    from train.tiny_chat import write_rows

    return write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(12)])

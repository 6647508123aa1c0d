"""The tiny chat model and its data, for the rooms that train and for those that command them."""

from pathlib import Path

import pytest


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

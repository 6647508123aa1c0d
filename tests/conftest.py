"""The tiny chat model and its data, for the rooms that train and for those that command them.

PEFT is the oracle of many tests. Where it is not installed, the files that ask it are left out, and the others run.
"""

import random
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

with suppress(ImportError):  # before anything imports distutils, after which it refuses, and quanto needs it
    import setuptools as _  # noqa: F401

if TYPE_CHECKING:
    from storage.fake_hub import FakeHub

_ASKS_PEFT = re.compile(r"^\s*(from|import) (peft|parity|init\.oracle|optimizers\.steps)\b", re.MULTILINE)

collect_ignore = [
    str(file.relative_to(Path(__file__).parent))
    for file in Path(__file__).parent.rglob("test_*.py")
    if find_spec("peft") is None and _ASKS_PEFT.search(file.read_text(encoding="utf-8"))
]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Each test draws the same numbers wherever and in whatever order it runs: its own name is the seed."""
    import torch

    own = zlib.crc32(request.node.nodeid.encode())
    random.seed(own)
    torch.manual_seed(own)


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator["FakeHub"]:
    """An empty hub that this process believes to be the Hugging Face hub, with a cache of its own and no token."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    from storage.fake_hub import served

    with served() as hub:
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        if "transformers.utils.hub" in sys.modules:  # it keeps its own, made on first use
            monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        huggingface_hub.utils.disable_progress_bars()
        yield hub
        huggingface_hub.utils.enable_progress_bars()
        huggingface_hub.close_session()

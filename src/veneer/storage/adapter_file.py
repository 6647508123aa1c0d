"""An adapter on disk: a folder with `adapter_config.json` and `adapter_model.safetensors`, in PEFT's format.

Reading happens in two steps: names, shapes and dtypes first (no torch), values only when those are right.
No pickle: `adapter_model.bin` is refused.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from veneer.errors import AdapterFileError, bullet_list, shortened
from veneer.storage.header import Header, read_header
from veneer.storage.values import bytes_of, read_values, write_values
from veneer.storage.write import write_folder

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CHECKSUM = "crc32"  # what it is called in the metadata of the weights
MAX_CONFIG_BYTES = 1 << 20
FLOATS = ("F64", "F32", "F16", "BF16")


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON object in `adapter_config.json`. Raises AdapterFileError naming the file, line and column."""
    file = Path(folder) / CONFIG_FILE
    _refuse_dangling(file)
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterFileError(f"{file} is larger than {MAX_CONFIG_BYTES:,} bytes; no adapter's config is.")
        text = file.read_bytes().decode("utf-8-sig")
        data = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except AdapterFileError:
        raise
    except FileNotFoundError:
        raise AdapterFileError(f"There is no {CONFIG_FILE} in {folder}{_what_is_there(Path(folder))}") from None
    except OSError as error:
        raise AdapterFileError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise AdapterFileError(f"{file} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise AdapterFileError(
            f"{file} is damaged or cut off: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise AdapterFileError(f"{file} is nested too deeply; no adapter's config is.") from None
    except ValueError as error:
        raise AdapterFileError(f"{file}: {error}") from None
    if not isinstance(data, dict):
        raise AdapterFileError(f"{file} must hold a JSON object, not a {type(data).__name__}.")
    return data


def read_weights_header(folder: Path) -> Header:
    """Names, shapes and dtypes in `adapter_model.safetensors`. Raises AdapterFileError."""
    file = Path(folder) / WEIGHTS_FILE
    _refuse_dangling(file)
    if not file.exists():
        if (Path(folder) / PICKLE_FILE).exists():
            raise AdapterFileError(
                f"{folder} holds its weights as {PICKLE_FILE}, a pickle, which can run code when it is read. "
                "If you trust it, convert it: "
                f"safetensors.torch.save_file(torch.load(old, weights_only=True), {WEIGHTS_FILE!r})"
            )
        raise AdapterFileError(f"There is no {WEIGHTS_FILE} in {folder}{_what_is_there(Path(folder))}")
    return read_header(file)


class Expected(NamedTuple):
    """What a tensor of the file must be like. Counters, as batch norm has one, are not floating point."""

    shape: tuple[int, ...]
    floating: bool = True


def check_header(folder: Path, header: Header, expected: Mapping[str, Expected], ignore: Iterable[str]) -> None:
    """Compare a file with what the model needs: every tensor there, none besides, shapes and kinds of number equal.

    `ignore` lists names that may be there and are not used. Raises AdapterFileError that lists every difference.
    """
    file = Path(folder) / WEIGHTS_FILE
    unused = set(ignore)
    missing = [f"missing      {name} {list(e.shape)}" for name, e in expected.items() if name not in header.tensors]
    extra = [
        f"not expected {name} {list(info.shape)}"
        for name, info in header.tensors.items()
        if name not in expected and name not in unused
    ]
    wrong = []
    for name, needed in expected.items():
        info = header.tensors.get(name)
        if info is not None and info.shape != needed.shape:
            wrong.append(f"wrong shape  {name} {list(info.shape)}, the model needs {list(needed.shape)}")
        if info is not None and needed.floating and info.dtype not in FLOATS:
            wrong.append(f"wrong dtype  {name} is {info.dtype}; adapters are floating point ({', '.join(FLOATS)})")
    problems = [line for kind in (missing, extra, wrong) for line in shortened(kind)]
    if problems:
        raise AdapterFileError(bullet_list(f"{file} does not fit this model and {CONFIG_FILE}:", problems))


def read_tensors(folder: Path, names: Iterable[str], header: Header | None = None) -> dict[str, "Tensor"]:
    """The named tensors, on the CPU. Raises AdapterFileError naming those that hold NaN or infinity.

    header  of the file, if it was read already
    """
    from veneer.functional.finite import not_finite

    file = Path(folder) / WEIGHTS_FILE
    tensors = read_values(file, read_weights_header(folder) if header is None else header, names)
    if broken := not_finite(tensors):
        raise AdapterFileError(
            bullet_list(f"{file} holds NaN or infinity, so it was broken before it was saved:", shortened(broken))
        )
    return tensors


def check_integrity(folder: Path, header: Header, tensors: Mapping[str, "Tensor"]) -> None:
    """Compare the tensors with the checksum the file carries, if it carries one. Raises AdapterFileError."""
    if len(tensors) != len(header.tensors):
        return
    recorded = {key: found for key, found in _CHECKSUMS.items() if key in header.metadata}
    if any(header.metadata[key] != found(tensors) for key, found in recorded.items()):
        raise AdapterFileError(
            f"{Path(folder) / WEIGHTS_FILE} was changed after it was written: its checksum differs. "
            "Copy or download it again."
        )


def checksum(tensors: Mapping[str, "Tensor"]) -> str:
    """CRC-32 over names, dtypes, shapes and bytes, in the order of names, in hexadecimal.

    It finds damage, not intent: whoever can change the values can change the checksum, which lies in the same file.
    A cryptographic one would find no more, and take as long as writing the file.
    """
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode(), crc)
        crc = zlib.crc32(bytes_of(tensor), crc)
    return f"{crc:08x}"


def _sha256(tensors: Mapping[str, "Tensor"]) -> str:
    """The checksum of files that earlier versions wrote: SHA-256 over the same."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


_CHECKSUMS = {CHECKSUM: checksum, "sha256": _sha256}


def write_adapter(
    folder: Path,
    config_json: str,
    tensors: Mapping[str, "Tensor"],
    *,
    metadata: Mapping[str, str] | None = None,
    beside: Callable[[Path, Header], None] | None = None,
) -> None:
    """Write both files in one step, read back and on the disk before they count.

    What is read back comes from memory if the disk is a local one. It finds what was written wrongly, here or by a file
    system in between; what the disk damages later is found by the same checksum when the adapter is loaded.

    beside  called with the folder that holds them and is about to take the old one's place, to add files of its own,
            and with the header of the weights

    Whatever happens, the folder holds the old adapter or the new one. Other files of the folder stay; a pickle of an
    older adapter goes, because readers would find two. Raises AdapterFileError if a value is not finite or not there,
    or if the files cannot be written.
    """
    from veneer.functional.finite import not_finite

    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise AdapterFileError(
            bullet_list(
                f"Not saved to {folder}: these tensors lie on the meta device, without values:", shortened(absent)
            )
        )
    if broken := not_finite(tensors):
        raise AdapterFileError(
            bullet_list(f"Not saved to {folder}: these tensors hold NaN or infinity:", shortened(broken))
        )
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seal = (CHECKSUM, 8, lambda: checksum(plain))

    def fill(stage: Path) -> None:
        write_values(stage / WEIGHTS_FILE, plain, metadata or {}, seal=seal)
        header = read_weights_header(stage)
        check_integrity(stage, header, read_values(stage / WEIGHTS_FILE, header, header.tensors))
        (stage / CONFIG_FILE).write_text(config_json, encoding="utf-8")
        if beside is not None:
            beside(stage, header)

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file; an adapter is saved to a folder.")
    try:
        write_folder(folder, fill)
        (folder / PICKLE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise AdapterFileError(f"Not saved to {folder}: {error.strerror or error}") from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice = sorted({name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1})
        raise ValueError(f"{', '.join(twice)} appears twice; remove one.")
    return data


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number an adapter can have.")


def _refuse_dangling(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        raise AdapterFileError(f"{file} is a link to a file that does not exist.")


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return ": the folder does not exist."
    names = sorted(entry.name for entry in folder.iterdir())[:6]
    return f"; it holds {', '.join(names)}." if names else "; it is empty."

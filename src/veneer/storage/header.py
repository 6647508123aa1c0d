"""The header of a safetensors file, read, checked and made without torch and without the tensors.

Layout: 8 bytes little-endian header length, that many bytes of JSON `{name: {dtype, shape, data_offsets}}`, the data.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from veneer.errors import AdapterFileError

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 32
MAX_BYTES = 1 << 63

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """One tensor as the header describes it: `dtype` in safetensors' words ("F32", "BF16"), size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds. `data_start` is where in the file the first tensor begins, in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(file: Path) -> Header:
    """Read and check the header. Raises AdapterFileError that names the file and what is wrong with it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(64)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8) or start[8:9] != b"{":
                _refuse_impostors(file, start)
                raise AdapterFileError(
                    f"{file} is damaged: it says its header has {length:,} bytes, the file has {size:,}. "
                    "Copy or download it again."
                )
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise AdapterFileError(f"{file} cannot be read: {error.strerror or error}") from None
    entries = _parse(file, text)
    metadata = entries.pop("__metadata__", {})
    if len(entries) > MAX_TENSORS:
        raise AdapterFileError(f"{file} lists {len(entries):,} tensors; an adapter has at most {MAX_TENSORS:,}.")
    tensors = {name: _tensor_info(file, name, entry) for name, entry in entries.items()}
    _check_extent(file, tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def packed_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header as it stands in a file, before the tensors; padded, so that they begin at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, info in tensors.items():
        place = (info.start, info.start + info.nbytes)
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": place}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _refuse_impostors(file: Path, start: bytes) -> None:
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise AdapterFileError(f"{file} is a pickle, not a safetensors file: it was renamed, or saved by torch.save.")
    if start.startswith(b"version https://git-lfs"):
        raise AdapterFileError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` where it lies.")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise AdapterFileError(f"{file} is an HTML page, not a safetensors file: the download went wrong.")
    if len(start) < 8:
        raise AdapterFileError(f"{file} is empty or cut off after {len(start)} bytes. Copy or download it again.")


def _parse(file: Path, text: bytes) -> dict:
    def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name appears twice")
        return entries

    try:
        entries = json.loads(text, object_pairs_hook=refuse_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("it is not a table of tensors")
        notes = entries.get("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("its metadata is not a table of texts")
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file} is damaged: its header cannot be read ({error}).") from None
    return entries


def _tensor_info(file: Path, name: str, entry: object) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            numbers = [*shape, start, end]
            whole = set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < MAX_BYTES
            if dtype in DTYPE_BYTES and whole and len(shape) <= MAX_DIMENSIONS:
                expected = prod(shape) * DTYPE_BYTES[dtype]
                if expected == end - start:
                    return TensorInfo(dtype, tuple(shape), expected, start)
    raise AdapterFileError(f"{file} is damaged: the header entry of {name!r} makes no sense: {str(entry)[:200]}")


def _check_extent(file: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            raise AdapterFileError(f"{file} is damaged: {name!r} does not begin where the tensor before it ends.")
        end += info.nbytes
    if end != data_bytes:
        what = "cut off" if end > data_bytes else "longer than its header says"
        raise AdapterFileError(
            f"{file} is {what}: its tensors need {end:,} bytes, it has {data_bytes:,}. Copy or download it again."
        )

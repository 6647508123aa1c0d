"""The values in a safetensors file, read into memory of their own, and written from the memory they are in.

A tensor that was read shares no memory with the file, so whoever writes to the file later changes nothing here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterFileError
from veneer.storage.header import Header, TensorInfo, packed_header
from veneer.storage.write import start_flush

if TYPE_CHECKING:
    from torch import Tensor

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_FLUSHED_AT_ONCE = 16 << 20


def read_values(file: Path, header: Header, names: Iterable[str]) -> dict[str, "Tensor"]:
    """The named tensors, on the CPU. Raises AdapterFileError."""
    names = list(names)
    tensors = dict(_read_each(file, header, names))
    return {name: tensors[name] for name in names}


def _read_each(file: Path, header: Header, names: Iterable[str]) -> Iterator[tuple[str, "Tensor"]]:
    """(name, tensor) of each, in the file's order, so that it is read from front to back."""
    import torch

    dtypes = _dtypes()
    try:
        with file.open("rb", buffering=0) as stream:
            place = 0
            for name in sorted(names, key=lambda name: header.tensors[name].start):
                info = header.tensors[name]
                if place != (begin := header.data_start + info.start):
                    stream.seek(begin)
                raw = torch.empty(info.nbytes, dtype=torch.uint8)
                _fill(stream, raw.numpy().data)
                place = begin + info.nbytes
                yield name, raw.view(dtypes[info.dtype]).view(info.shape)
    except (OSError, EOFError, KeyError) as error:
        raise AdapterFileError(f"{file} cannot be read: {error}") from None


def read_rows(file: Path, info: TensorInfo, begin: int, rows: slice) -> "Tensor":
    """Rows `rows.start` to `rows.stop` of a tensor that begins at byte `begin` of a file, on the CPU.

    Raises AdapterFileError.
    """
    import torch

    each, count = info.nbytes // info.shape[0], rows.stop - rows.start
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin + rows.start * each)
            raw = torch.empty(count * each, dtype=torch.uint8)
            _fill(stream, raw.numpy().data)
            return raw.view(_dtypes()[info.dtype]).view(count, *info.shape[1:])
    except (OSError, EOFError, KeyError) as error:
        raise AdapterFileError(f"{file} cannot be read: {error}") from None


def _fill(stream: Any, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:] if done else buffer)
        if not count:
            raise EOFError("it became shorter while it was read")
        done += count


def write_values(
    file: Path,
    tensors: Mapping[str, "Tensor"],
    notes: Mapping[str, str],
    *,
    seal: tuple[str, int, Callable[[], str]] | None = None,
) -> Header:
    """Write a new file that holds these tensors, contiguous and on the CPU, without a copy; returns its header.

    notes  the metadata, besides `format`
    seal   (key, length, f): one more note, whose text of this length f() finds while the disk takes the values

    Tensors that share memory are written one by one. Raises OSError, and AdapterFileError for a dtype that such files
    do not have.
    """
    key, length, find = seal or ("", 0, str)
    infos, metadata = _laid_out(file, tensors), {"format": "pt", **({key: " " * length} if seal else {}), **notes}
    packed = packed_header(infos, metadata)
    with file.open("xb", buffering=0) as stream:
        _write(stream, packed)
        flushed, place = 0, len(packed)
        for name, info in infos.items():
            _write(stream, bytes_of(tensors[name]))
            place += info.nbytes
            if place - flushed >= _FLUSHED_AT_ONCE:
                start_flush(stream.fileno(), flushed, place - flushed)
                flushed = place
        start_flush(stream.fileno(), flushed, place - flushed)
        if seal:
            metadata[key] = find()
            stream.seek(0)
            _write(stream, packed_header(infos, metadata))
    return Header(infos, metadata, len(packed))


def _write(stream: Any, buffer: Any) -> None:
    done, size = 0, memoryview(buffer).nbytes
    while done < size:
        done += stream.write(memoryview(buffer).cast("B")[done:] if done else buffer)


def _laid_out(file: Path, tensors: Mapping[str, "Tensor"]) -> dict[str, TensorInfo]:
    """Where each tensor goes: the widest numbers first, so that each begins at a multiple of its own width."""
    infos: dict[str, TensorInfo] = {}
    start, words = 0, {dtype: word for word, dtype in _dtypes().items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if (word := words.get(tensor.dtype)) is None:
            raise AdapterFileError(f"{file} cannot hold {name}: safetensors files have no {tensor.dtype}.")
        infos[name] = TensorInfo(word, tuple(tensor.shape), tensor.nbytes, start)
        start += tensor.nbytes
    return infos


def _dtypes() -> dict[str, Any]:
    import torch

    return {word: getattr(torch, name) for word, name in _TORCH_NAMES.items() if hasattr(torch, name)}


def bytes_of(tensor: "Tensor") -> Any:
    """The bytes of a contiguous tensor on the CPU as a buffer, without a copy."""
    import torch

    # in one dimension: where one has size 1, its stride may be anything, which `view` minds
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()

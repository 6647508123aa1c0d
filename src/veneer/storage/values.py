"""The values in a safetensors file, read into memory of their own.

A tensor that was read shares no memory with the file, so whoever writes to the file later changes nothing here.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterFileError
from veneer.storage.header import Header

if TYPE_CHECKING:
    from torch import Tensor

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def read_values(file: Path, header: Header, names: Iterable[str]) -> dict[str, "Tensor"]:
    """The named tensors, on the CPU. Raises AdapterFileError."""
    names = list(names)
    tensors = dict(_read_each(file, header, names))
    return {name: tensors[name] for name in names}


def _read_each(file: Path, header: Header, names: Iterable[str]) -> Iterator[tuple[str, "Tensor"]]:
    """(name, tensor) of each, in the file's order, so that it is read from front to back."""
    import torch

    dtypes = {word: getattr(torch, name) for word, name in _TORCH_NAMES.items() if hasattr(torch, name)}
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


def _fill(stream: Any, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:] if done else buffer)
        if not count:
            raise EOFError("it became shorter while it was read")
        done += count


def bytes_of(tensor: "Tensor") -> "Tensor":
    """The bytes of a contiguous tensor on the CPU, in one dimension, without a copy."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8)


def holds(file: Path, header: Header, tensors: Mapping[str, "Tensor"]) -> bool:
    """Whether a file holds just these tensors, bit for bit; they are contiguous and on the CPU."""
    if header.tensors.keys() != tensors.keys():
        return False
    read = _read_each(file, header, tensors)
    return all(
        there.dtype == tensors[name].dtype and there.shape == tensors[name].shape and _equal(there, tensors[name])
        for name, there in read
    )


def _equal(one: "Tensor", other: "Tensor") -> bool:
    import torch

    one, other = bytes_of(one), bytes_of(other)
    if len(one) % 8 == 0 and other.storage_offset() % 8 == 0 and other.data_ptr() % 8 == 0:  # eight at a time
        one, other = one.view(torch.int64), other.view(torch.int64)
    return torch.equal(one, other)

"""Values of a file: all dtypes, memory of their own, and the bytes that safetensors itself would write."""

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from veneer.errors import AdapterFileError
from veneer.storage import values
from veneer.storage.header import read_header
from veneer.storage.values import read_values, write_values

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    save_file({**tensors, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()


def test_every_dtype_is_read_as_safetensors_reads_it(file):
    header, expected = read_header(file), load_file(file)
    found = read_values(file, header, reversed(list(header.tensors)))
    assert list(found) == list(reversed(list(header.tensors)))
    assert all(same(found[name], value) for name, value in expected.items())
    assert same(read_values(file, header, ["scalar"])["scalar"], torch.tensor(3.5))


def test_what_is_read_shares_no_memory_with_the_file_or_the_others(file):
    header = read_header(file)
    found = read_values(file, header, header.tensors)
    before = {name: value.clone() for name, value in found.items()}
    with file.open("r+b") as stream:
        stream.seek(header.data_start)
        stream.write(b"\1" * (file.stat().st_size - header.data_start))
    assert all(same(found[name], value) for name, value in before.items())
    there = [value.untyped_storage().data_ptr() for value in found.values() if value.numel()]
    assert len(set(there)) == len(there)


def test_a_file_that_became_shorter_is_an_error(file):
    header = read_header(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(AdapterFileError, match="became shorter"):
        read_values(file, header, header.tensors)


def every_dtype():
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in [*DTYPES, torch.complex64]}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "modèle": torch.ones(1)}


def test_the_file_is_byte_for_byte_that_of_safetensors(tmp_path):
    """Each dtype alone, and those of one width together: among dtypes of one width the order is free."""
    for name, value in every_dtype().items():
        tensors = {f"b.{name}": value, f"a.{name}": value.clone(), "c": torch.zeros(3, dtype=value.dtype)}
        header = write_values(tmp_path / name, tensors, {})
        assert (tmp_path / name).read_bytes() == save(tensors, metadata={"format": "pt"})
        assert read_header(tmp_path / name) == header


def test_every_dtype_is_written_so_that_safetensors_and_the_reader_find_it(tmp_path):
    tensors = every_dtype()
    header = write_values(tmp_path / "a", tensors, {"note": "ä"})
    assert read_header(tmp_path / "a") == header
    assert header.metadata == {"format": "pt", "note": "ä"}
    assert header.data_start % 8 == 0
    assert all(info.start % tensors[name].element_size() == 0 for name, info in header.tensors.items())
    for found in (load_file(tmp_path / "a"), read_values(tmp_path / "a", header, tensors)):
        assert found.keys() == tensors.keys()
        assert all(same(found[name], value) for name, value in tensors.items())


def test_tensors_of_one_memory_are_written_each(tmp_path):
    whole = torch.arange(8.0)
    write_values(tmp_path / "a", {"whole": whole, "part": whole[2:5], "again": whole}, {})
    assert {name: value.tolist() for name, value in load_file(tmp_path / "a").items()} == {
        "whole": whole.tolist(),
        "part": [2, 3, 4],
        "again": whole.tolist(),
    }


def test_a_note_that_is_found_while_the_disk_takes_the_values(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(values, "_FLUSHED_AT_ONCE", 1000)
    monkeypatch.setattr(values, "start_flush", lambda descriptor, start, length: begun.append((start, length)))
    tensors = {f"{i}": torch.full((100,), float(i)) for i in range(9)}

    def find():
        assert sum(length for _, length in begun) == (tmp_path / "a").stat().st_size
        return "2.0"

    header = write_values(tmp_path / "a", tensors, {"x": "1"}, seal=("sum", 3, find))
    assert header == read_header(tmp_path / "a")
    assert header.metadata == {"format": "pt", "x": "1", "sum": "2.0"}
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "a").items())
    ends = [0, *(start + length for start, length in begun)]
    assert [start for start, _ in begun] == ends[:-1]
    assert len(begun) > 3


def test_nothing_is_copied_on_the_way_to_the_file(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(7).bfloat16(), "c": torch.tensor(1.0)}
    seen = []
    real = values.bytes_of
    monkeypatch.setattr(values, "bytes_of", lambda tensor: seen.append(real(tensor)) or seen[-1])
    write_values(tmp_path / "a", tensors, {})
    places = {buffer.__array_interface__["data"][0] for buffer in seen}
    assert places == {tensor.data_ptr() for tensor in tensors.values()}


def test_a_system_that_takes_a_part_at_a_time(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(3, 50), "b": torch.randn(7).bfloat16(), "c": torch.tensor(1.0)}
    real = Path.open

    class Halting(io.FileIO):
        def write(self, buffer):
            return super().write(memoryview(buffer).cast("B")[:33])

    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode, **options: Halting(path, "x") if mode == "xb" else real(path, mode, **options),
    )
    header = write_values(tmp_path / "a", tensors, {})
    assert read_header(tmp_path / "a") == header
    assert all(same(found, tensors[name]) for name, found in load_file(tmp_path / "a").items())


@pytest.mark.parametrize("shape", [(24, 1), (1, 24), (1, 1), (3, 1, 5), ()])
def test_a_dimension_of_size_1_may_have_any_stride(tmp_path, shape):
    plain = torch.randn(shape, dtype=torch.float64)
    strides = [99 if n == 1 else stride for n, stride in zip(shape, plain.stride(), strict=True)]
    odd = plain.as_strided(shape, strides)
    assert odd.is_contiguous()
    write_values(tmp_path / "odd.safetensors", {"odd": odd}, {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "odd.safetensors")["odd"], odd)

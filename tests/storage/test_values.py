"""Values of a file: all dtypes, memory of their own, compared bit for bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.errors import AdapterFileError
from veneer.storage.header import read_header
from veneer.storage.values import holds, read_values

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    values = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    save_file({**values, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}, tmp_path / "a.safetensors")
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


def test_one_changed_bit_is_noticed(file):
    header, tensors = read_header(file), load_file(file)
    tensors = {name: value.clone() for name, value in tensors.items()}
    assert holds(file, header, tensors)
    assert not holds(file, header, {**tensors, "more": torch.zeros(1)})
    for place in (header.data_start, file.stat().st_size - 1):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        other = file.with_name("b.safetensors")
        other.write_bytes(content)
        assert not holds(other, header, tensors)

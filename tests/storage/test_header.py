import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from veneer.errors import AdapterFileError
from veneer.storage.header import DTYPE_BYTES, read_header

GOOD = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"note": "x"})


def packed(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def refusal(tmp_path):
    def of(content: bytes) -> str:
        file = tmp_path / "adapter_model.safetensors"
        file.write_bytes(content)
        with pytest.raises(AdapterFileError) as caught:
            read_header(file)
        message = str(caught.value)
        assert str(file) in message
        return message

    return of


def test_names_shapes_dtypes_and_notes(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(GOOD)
    header = read_header(file)
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
    }
    assert header.metadata["note"] == "x"
    assert file.stat().st_size - header.data_start == 32


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_dtypes_that_safetensors_writes(name, dtype, tmp_path):
    save_file({"t": torch.zeros(3, dtype=dtype), "empty": torch.zeros(0, 2, dtype=dtype)}, tmp_path / "f")
    header = read_header(tmp_path / "f")
    assert (header.tensors["t"].dtype, header.tensors["t"].nbytes) == (name, 3 * DTYPE_BYTES[name])
    assert header.tensors["empty"].shape == (0, 2)


def test_a_scalar_has_no_dimensions(tmp_path):
    save_file({"t": torch.tensor(2.0)}, tmp_path / "f")
    assert read_header(tmp_path / "f").tensors["t"].shape == ()


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_file_that_ends_before_the_header_does(refusal, length):
    assert f"empty or cut off after {length} bytes" in refusal(GOOD[:length])


@pytest.mark.parametrize("length", [8, 9, 60])
def test_a_file_that_ends_within_the_header(refusal, length):
    assert "it says its header has" in refusal(GOOD[:length])


@pytest.mark.parametrize("missing", [1, 31, 32])
def test_a_file_that_lacks_data(refusal, missing):
    assert f"is cut off: its tensors need 32 bytes, it has {32 - missing}" in refusal(GOOD[:-missing])


def test_a_file_with_a_byte_too_many(refusal):
    assert "longer than its header says: its tensors need 32 bytes, it has 33" in refusal(GOOD + b"\0")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "an HTML page"),
        (b"\n  <html lang='en'><head></head></html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "is a pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "is a pickle"),
    ],
)
def test_files_of_another_kind(refusal, content, expected):
    assert expected in refusal(content)


DAMAGED = {
    "a huge length": packed({}, length=1 << 60),
    "a length above the limit": packed(b" " * 100, length=17 << 20),
    "a length of zero": packed(b"", b"0" * 20),
    "no JSON": packed(b"{'a': 1}"),
    "not UTF-8": packed(b'{"\xff\xfe": 1}'),
    "a list": packed([1, 2]),
    "a number": packed(b"12"),
    "nesting without end": packed(b"[" * 100_000),
    "a number of 10,000 digits": packed(b'{"a": ' + b"9" * 10_000 + b"}"),
    "a name twice": packed(
        b'{"a": %b, "a": %b}' % (json.dumps(entry()).encode(), json.dumps(entry()).encode()), bytes(8)
    ),
    "metadata that is a list": packed({"__metadata__": [1]}),
    "metadata that is no text": packed({"__metadata__": {"sha256": 5}}),
    "a gap": packed({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "an overlap": packed({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "an overlap and as many bytes": packed({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(16)),
    "forty dimensions": packed({"a": entry(shape=[1] * 40 + [2])}, bytes(8)),
    "not from the start": packed({"a": entry(offsets=(4, 12))}, bytes(12)),
    "beyond the end": packed({"a": entry(shape=(4,), offsets=(0, 16))}, bytes(8)),
    "shape and size differ": packed({"a": entry(shape=(3,))}, bytes(8)),
    "backwards": packed({"a": entry(offsets=(8, 0))}, bytes(8)),
    "negative dimensions": packed({"a": entry(shape=(-1, -2))}, bytes(8)),
    "a dimension that is true": packed({"a": entry(shape=(True, 2))}, bytes(8)),
    "an offset that is true": packed({"a": entry("U8", (1,), (False, True))}, bytes(1)),
    "a fraction": packed({"a": entry(shape=(2.0,))}, bytes(8)),
    "an absurd dimension": packed({"a": entry(shape=(10**30, 0), offsets=(0, 0))}),
    "very many dimensions": packed({"a": entry(shape=[10**18] * 100_000)}, bytes(8)),
    "an unknown dtype": packed({"a": entry("F3")}, bytes(8)),
    "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "an entry that is null": packed({"a": None}),
    "NaN": packed(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)),
    "too many tensors": packed({str(i): entry(shape=(0,), offsets=(0, 0)) for i in range(100_001)}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused(refusal, content):
    assert len(refusal(content)) < 700


def test_a_damaged_entry_is_named(refusal):
    assert "the header entry of 'layer.a' makes no sense" in refusal(packed({"layer.a": entry("F3")}, bytes(8)))


@pytest.mark.parametrize("name", [".", "missing"])
def test_what_is_no_file_is_named(tmp_path, name):
    with pytest.raises(AdapterFileError, match="cannot be read: (Is a directory|No such file)"):
        read_header(tmp_path / name)


def readable_by_safetensors(file) -> bool:
    try:
        with safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                opened.get_tensor(name)
    except Exception:
        return False
    return True


def check_bytes(file, content):
    """Only AdapterFileError ever, and what is accepted can be read."""
    file.write_bytes(content)
    try:
        read_header(file)
    except AdapterFileError:
        return
    assert readable_by_safetensors(file)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cut=st.integers(0, len(GOOD)), position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
def test_any_changed_byte_and_any_cut(tmp_path_factory, cut, position, value):
    changed = bytearray(GOOD)
    changed[position] = value
    check_bytes(tmp_path_factory.getbasetemp() / "changed", bytes(changed[:cut]))
    check_bytes(tmp_path_factory.getbasetemp() / "changed", bytes(changed))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory, content):
    check_bytes(tmp_path_factory.getbasetemp() / "bytes", content)
    check_bytes(tmp_path_factory.getbasetemp() / "bytes", packed(content))


WORDS = st.sampled_from(["a", "__metadata__", "dtype", "shape", "data_offsets", "F32", "U8"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": WORDS,
        "shape": st.lists(st.integers(0, 3), max_size=2),
        "data_offsets": st.lists(st.integers(0, 12), min_size=2, max_size=2),
    }
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(header=JSON | st.dictionaries(WORDS, ENTRIES, max_size=2), size=st.integers(0, 24))
def test_any_json(tmp_path_factory, header, size):
    check_bytes(tmp_path_factory.getbasetemp() / "json", packed(header, bytes(size)))


@pytest.mark.parametrize("length", [0x0280, 0x043C, 0x4B50])
def test_a_length_that_looks_like_another_format_is_only_a_length(tmp_path, length):
    """0x0280 begins as a pickle does, 0x3c is '<', 0x4b50 is 'PK'."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
    assert read_header(file).tensors == {}

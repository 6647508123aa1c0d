import errno
import json
import os
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.errors import AdapterFileError
from veneer.storage import adapter_file
from veneer.storage.adapter_file import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    Expected,
    check_header,
    check_integrity,
    checksum,
    read_config,
    read_tensors,
    read_weights_header,
    write_adapter,
)

TENSORS = {"x.lora_A.weight": torch.randn(2, 3), "x.lora_B.weight": torch.randn(4, 2).bfloat16()}
SHAPES = {name: Expected(tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def written(folder, tensors=TENSORS, config="{}", **options):
    write_adapter(folder, config, tensors, **options)
    return folder


def read_all(folder):
    header = read_weights_header(folder)
    tensors = read_tensors(folder, header.tensors)
    check_integrity(folder, header, tensors)
    return tensors


# The config file


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"r": 8}', {"r": 8}),
        (b'\xef\xbb\xbf{"r": 8}', {"r": 8}),
        ('{"base": "mod\u00e8le"}'.encode(), {"base": "mod\u00e8le"}),
        (b" {}\n\n", {}),
    ],
)
def test_a_config_file(tmp_path, content, expected):
    (tmp_path / CONFIG_FILE).write_bytes(content)
    assert read_config(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "damaged or cut off: Expecting value at line 1, column 1"),
        (b'{"r": 8,\n "lora_al', "damaged or cut off: Unterminated string .*line 2, column 2"),
        (b'{"r": 8', "damaged or cut off"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b'"text"', "must hold a JSON object, not a str"),
        (b"null", "must hold a JSON object, not a NoneType"),
        (b'{"lora_alpha": 8, "r": 1, "lora_alpha": 32}', "lora_alpha appears twice; remove one"),
        (b'{"rank_pattern": {"q": 1, "q": 2}}', "q appears twice"),
        (b'{"lora_alpha": NaN}', "NaN is not a number an adapter can have"),
        (b'{"lora_alpha": -Infinity}', "-Infinity is not a number"),
        ('{"r": 8}'.encode("utf-16"), "is not UTF-8 text"),
        (b'{"r": "\xff"}', "is not UTF-8 text"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"r": ' + b"9" * 5000 + b"}", "digits"),
        (b" " * (1 << 20) + b"{}", "larger than 1,048,576 bytes"),
    ],
)
def test_a_damaged_config_file_is_named_with_what_is_wrong(tmp_path, content, expected):
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterFileError, match=expected) as caught:
        read_config(tmp_path)
    assert str(caught.value).count(str(tmp_path / CONFIG_FILE)) == 1


def test_a_missing_config_file_is_told_with_what_is_there(tmp_path):
    with pytest.raises(AdapterFileError, match="There is no adapter_config.json in .*; it is empty"):
        read_config(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(AdapterFileError, match=r"it holds config.json\."):
        read_config(tmp_path)
    with pytest.raises(AdapterFileError, match="the folder does not exist"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize("read", [read_config, read_weights_header])
def test_links_that_lead_nowhere(tmp_path, read):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(AdapterFileError, match="is a link to a file that does not exist"):
        read(tmp_path)


@pytest.mark.parametrize("read", [read_config, read_weights_header])
def test_a_folder_in_the_place_of_a_file(tmp_path, read):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).mkdir()
    with pytest.raises(AdapterFileError, match="cannot be read: Is a directory"):
        read(tmp_path)


# The weights file


def test_a_missing_weights_file(tmp_path):
    with pytest.raises(AdapterFileError, match="There is no adapter_model.safetensors in .*; it is empty"):
        read_weights_header(tmp_path)


def test_a_pickle_is_refused_with_the_way_out(tmp_path):
    (tmp_path / PICKLE_FILE).write_bytes(b"x")
    with pytest.raises(AdapterFileError, match="a pickle, which can run code .* weights_only=True"):
        read_weights_header(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"x.lora_B.weight": None}, "missing      x.lora_B.weight [4, 2]"),
        ({"lm_head.weight": torch.zeros(5)}, "not expected lm_head.weight [5]"),
        ({"x.lora_A.weight": torch.zeros(3, 2)}, "wrong shape  x.lora_A.weight [3, 2], the model needs [2, 3]"),
        ({"x.lora_A.weight": torch.zeros(2, 3, dtype=torch.int8)}, "wrong dtype  x.lora_A.weight is I8; adapters are"),
        ({"x.lora_A.weight": torch.zeros(2, 3, dtype=torch.bool)}, "is BOOL"),
        ({"x.lora_A.weight": torch.zeros(2, 3, dtype=torch.complex64)}, "is C64"),
        ({"x.lora_A.weight": torch.zeros(2, 3, dtype=torch.float8_e4m3fn)}, "is F8_E4M3"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, expected):
    tensors = {name: tensor for name, tensor in {**TENSORS, **change}.items() if tensor is not None}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterFileError) as caught:
        check_header(tmp_path, read_weights_header(tmp_path), SHAPES, ())
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_every_difference_is_named_and_long_lists_are_cut(tmp_path):
    save_file({f"extra.{i}": torch.zeros(1) for i in range(9)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterFileError) as caught:
        check_header(tmp_path, read_weights_header(tmp_path), SHAPES, ())
    lines = str(caught.value).splitlines()
    assert sum("missing" in line for line in lines) == 2
    assert sum("not expected" in line for line in lines) == 6
    assert lines[-1] == "  … and 3 more like these"


def test_a_file_that_fits_and_names_to_ignore(tmp_path):
    save_file({**TENSORS, "known": torch.zeros(1, dtype=torch.int8)}, tmp_path / WEIGHTS_FILE)
    check_header(tmp_path, read_weights_header(tmp_path), SHAPES, ["known"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_values_are_refused_both_ways(tmp_path, value):
    broken = {**TENSORS, "x.lora_A.weight": torch.tensor([[0.0, value]])}
    save_file(broken, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterFileError, match=r"holds NaN or infinity.*\n  x.lora_A.weight$"):
        read_tensors(tmp_path, broken)
    with pytest.raises(AdapterFileError, match="Not saved to .*: these tensors hold NaN or infinity"):
        write_adapter(tmp_path / "new", "{}", broken)
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_not_there(tmp_path):
    with pytest.raises(AdapterFileError, match="cannot be read"):
        read_tensors(written(tmp_path / "a"), ["other"])


# The checksum


def test_any_changed_data_byte_is_noticed(tmp_path):
    folder = written(tmp_path / "a", {"t": torch.tensor([1.0, 2.0]), "u": torch.ones(3).bfloat16()})
    file = folder / WEIGHTS_FILE
    good, start = file.read_bytes(), read_weights_header(folder).data_start
    assert len(good) - start == 14
    for position in range(start, len(good)):
        for bit in (0, 7):
            changed = bytearray(good)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(AdapterFileError, match="checksum differs|NaN or infinity"):
                read_all(folder)


def test_swapped_tensors_are_noticed(tmp_path):
    folder = written(tmp_path / "a", {"t": torch.zeros(2), "u": torch.ones(2)})
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(
        content.replace(b'"t":', b'"v":').replace(b'"u":', b'"t":').replace(b'"v":', b'"u":')
    )
    with pytest.raises(AdapterFileError, match="checksum differs"):
        read_all(folder)


@pytest.mark.parametrize(
    "other",
    [
        {"t": torch.tensor([1.0, 3.0])},
        {"u": torch.tensor([1.0, 2.0])},
        {"t": torch.tensor([[1.0, 2.0]])},
        {"t": torch.tensor([1.0, 2.0]).view(torch.int32)},
    ],
)
def test_a_checksum_covers_names_dtypes_shapes_and_values(other):
    assert checksum(other) != checksum({"t": torch.tensor([1.0, 2.0])})


def test_a_checksum_does_not_see_order_or_layout():
    t, u = torch.randn(3, 4), torch.tensor(1.0)
    assert checksum({"t": t, "u": u}) == checksum({"u": u, "t": t.T.contiguous().T})


def test_files_without_a_checksum_are_read(tmp_path):
    save_file(TENSORS, tmp_path / WEIGHTS_FILE)
    assert read_all(tmp_path).keys() == TENSORS.keys()


# Writing


def test_what_is_written_is_read_back(tmp_path):
    folder = written(tmp_path / "deep" / "a", config='{"r": 2}', metadata={"note": "x"})
    assert sorted(entry.name for entry in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert read_config(folder) == {"r": 2}
    assert read_weights_header(folder).metadata["note"] == "x"
    for name, tensor in read_all(folder).items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_the_order_of_tensors_does_not_matter(tmp_path):
    one, two = written(tmp_path / "a"), written(tmp_path / "b", dict(reversed(TENSORS.items())))
    recorded = [read_weights_header(folder).metadata["crc32"] for folder in (one, two)]
    assert recorded == [checksum(load_file(one / WEIGHTS_FILE))] * 2


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.arange(6.0).reshape(2, 3).T},
        {"a": torch.arange(6.0)[1:4]},
        {"a": torch.tensor(1.0), "b": torch.zeros(0, 3)},
        {"a": torch.ones(2, requires_grad=True)},
        {"a": (shared := torch.arange(4.0)), "b": shared},
        {"a": shared[:3], "b": shared[1:]},
        {"a": shared.expand(3, 4)},
    ],
    ids=["transposed", "a slice", "scalar and empty", "with gradient", "twice", "overlapping", "expanded"],
)
def test_tensors_of_any_layout(tmp_path, tensors):
    found = read_all(written(tmp_path / "a", tensors))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_pickle_of_an_older_adapter_goes_and_other_files_stay(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / PICKLE_FILE).write_bytes(b"old")
    (folder / "README.md").write_text("mine")
    written(folder)
    assert sorted(entry.name for entry in folder.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(AdapterFileError, match="is a file; an adapter is saved to a folder"):
        written(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_a_disk_that_changes_what_is_written_is_noticed(tmp_path, monkeypatch):
    real = adapter_file.write_values

    def careless(file, tensors, notes, **seal):
        header = real(file, tensors, notes, **seal)
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last[0] ^ 1]))
        return header

    monkeypatch.setattr(adapter_file, "write_values", careless)
    with pytest.raises(AdapterFileError, match="checksum differs"):
        written(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [False, True])
def test_the_checksum_of_an_earlier_version_is_compared_too(tmp_path, changed):
    folder = written(tmp_path / "a")
    header = read_weights_header(folder)
    tensors = read_tensors(folder, header.tensors)
    notes = {"format": "pt", "sha256": adapter_file._sha256(tensors)}
    save_file({name: value + changed for name, value in tensors.items()}, folder / WEIGHTS_FILE, metadata=notes)
    header = read_weights_header(folder)
    assert "crc32" not in header.metadata
    with pytest.raises(AdapterFileError, match="checksum differs") if changed else nullcontext():
        check_integrity(folder, header, read_tensors(folder, header.tensors))


@pytest.mark.parametrize("n", [1, 2])
def test_a_disk_that_fails_when_it_is_flushed_is_an_error_of_ours(tmp_path, monkeypatch, n):
    before = {file.name: file.read_bytes() for file in written(tmp_path / "a").iterdir()}
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == n:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(AdapterFileError, match=r"Not saved to .*a: Input/output error"):
        written(tmp_path / "a", {"other": torch.ones(3)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before


def test_a_full_disk_is_an_error_of_ours(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {f"{i}": torch.ones(5000) for i in range(5)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as if no more were free
        with pytest.raises(AdapterFileError, match=r"Not saved to .*a: File too large"):
            written(tmp_path / "a", tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_files_do_not_have_is_named(tmp_path):
    with pytest.raises(AdapterFileError, match="cannot hold a: safetensors files have no torch.complex128"):
        written(tmp_path / "a", {"a": torch.ones(2, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_usual_mode(tmp_path):
    old = os.umask(0o027)
    try:
        folder = written(tmp_path / "a")
    finally:
        os.umask(old)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o640"}


def test_config_text_is_written_as_given(tmp_path):
    text = json.dumps({"base": "modèle"}, ensure_ascii=False, indent=2) + "\n"
    assert (written(tmp_path / "a", config=text) / CONFIG_FILE).read_bytes() == text.encode()

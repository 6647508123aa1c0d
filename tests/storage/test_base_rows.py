"""Rows of a base weight are read from its file alone, without the rest of it."""

import pytest
import torch
from safetensors.torch import save_file

from veneer.errors import AdapterFileError
from veneer.storage.checkpoint import open_checkpoint


def test_rows_of_a_tensor_are_those_of_the_whole(tmp_path):
    tensors = {"a": torch.randn(5, 3, 2), "b": torch.arange(7, dtype=torch.bfloat16), "c": torch.randn(2, 4).double()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, rows in (("a", slice(1, 4)), ("a", slice(5, 5)), ("b", slice(6, 7)), ("c", slice(0, 2))):
        assert torch.equal(checkpoint.read_rows(name, rows), tensors[name][rows])


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(50, 3)}, file)
    checkpoint = open_checkpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AdapterFileError, match="cannot be read"):
        checkpoint.read_rows("a", slice(40, 50))

import json
import shutil
from pathlib import Path

import pytest
import torch

from veneer.errors import MissingPackageError, RunError
from veneer.train import packages
from veneer.train.load import load_model, load_tokenizer, skeleton, torch_dtype


def test_a_model_is_loaded_in_the_dtype_asked_for(chat_model: Path) -> None:
    assert load_model(str(chat_model), dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(str(chat_model), dtype="stored").dtype == torch.float32
    assert torch_dtype("float32") is torch.float32


def test_a_skeleton_has_shapes_and_no_weights(chat_model: Path) -> None:
    bare = skeleton(str(chat_model))
    assert {parameter.device.type for parameter in bare.parameters()} == {"meta"}
    assert type(bare).__name__ == "LlamaForCausalLM"


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"There is no model folder .*nowhere"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match=r"The configuration of .* could not be loaded: "):
        skeleton(str(tmp_path))
    with pytest.raises(RunError, match=r"The tokenizer of .* could not be loaded: "):
        load_tokenizer(str(tmp_path))


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def test_damaged_weights_are_named(chat_model: Path, tmp_path: Path) -> None:
    broken = copied(chat_model, tmp_path)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RunError, match=r"The weights of .*copy are damaged or cut off: "):
        load_model(str(broken))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vocab_size", 300, r"The weights of .*copy do not fit its config.json\."),
        ("num_hidden_layers", 3, r"lack 9 tensors its config.json asks for, first model.layers.2"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    chat_model: Path, tmp_path: Path, key: str, value: int, said: str
) -> None:
    broken = copied(chat_model, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(RunError, match=said):
        load_model(str(broken))


def test_a_name_that_is_no_folder_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(RunError, match="We couldn't connect.*\n.*no folder user/name here.*Without a connection"):
        load_tokenizer("user/name")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(MissingPackageError, match=r"needs trl, not installed here. .*pip install 'veneer\[train\]'"):
        packages.require("train")
    assert not packages.has("train")
    assert packages.has("plot")

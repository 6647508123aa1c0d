import pytest

import tiny
from veneer import LoraConfig, get_peft_model
from veneer.cli import main
from veneer.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def adapter(tmp_path):
    get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_a_folder_goes_to_the_hub(hub, adapter, monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", "hf_user")
    options = ["--private", "--token-from-env", "MY_TOKEN", "--message", "first"]
    assert run("push", adapter, "user/poet", *options) == 0
    assert hub["user/poet"].private
    assert hub["user/poet"].messages[-1][0] == "first"
    assert {CONFIG_FILE, WEIGHTS_FILE, "README.md"} < set(hub["user/poet"].files())
    assert f"Pushed {adapter}: {hub.url}/user/poet/commit/" in capsys.readouterr().out
    assert run("push", adapter, "user/poet", "--revision", "v2", "--token-from-env", "MY_TOKEN") == 0
    assert "v2" in hub["user/poet"].refs


def test_what_goes_wrong_is_one_line(hub, adapter, tmp_path, capsys):
    for arguments, said in (
        ([adapter, "user/poet"], "the hub does not know who you are"),
        ([adapter, "user/poet", "--token-from-env", "NO_SUCH"], "There is no environment variable NO_SUCH"),
        ([str(tmp_path / "nothing"), "user/poet"], "the folder does not exist"),
    ):
        assert run("push", *arguments) == 2
        assert said in capsys.readouterr().err
    assert hub.repositories == {}

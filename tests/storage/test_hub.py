"""Adapters from the hub, against a hub of our own."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from veneer.errors import AdapterFileError
from veneer.storage.adapter_file import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from veneer.storage.hub import HUB_OPTIONS, adapter_folder, holds, is_hub_id

ADAPTER = {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"}


def message_of(location, **options) -> str:
    with pytest.raises(AdapterFileError) as caught:
        adapter_folder(location, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub tries again and again, and waits in between."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=_http.time.time))


def test_a_folder_is_found_without_the_hub(tmp_path, hub):
    (tmp_path / "sub").mkdir()
    assert adapter_folder(tmp_path) == tmp_path
    assert adapter_folder(str(tmp_path), subfolder="sub") == tmp_path / "sub"
    assert hub.asked == []


def test_a_folder_comes_before_a_repository_of_that_name(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert adapter_folder("user/name") == Path("user/name")
    assert hub.asked == []


@pytest.mark.parametrize(
    "location",
    ["nowhere", "./user/name", "/user/name", "../name", "a/b/c", "~/adapter", "", "x" * 5000, Path("/no/such")],
)
def test_what_is_no_hub_id_is_told_so_and_not_asked_for(location, hub):
    assert re.match("There is no folder .*not a hub id|x* cannot be read: File name too long", message_of(location))
    assert hub.asked == []


def test_the_address_of_a_page_is_turned_into_an_id(hub):
    said = message_of("https://huggingface.co/user/name/tree/main")
    assert said.endswith("An adapter on the hub is named by its id alone: 'user/name'.")


@pytest.mark.parametrize("location", ["{}/runs/frist", "runs/frist"])
def test_a_mistyped_folder_is_guessed(location, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    found = location.format(tmp_path).replace("frist", "first")
    assert message_of(location.format(tmp_path)).endswith(f" Did you mean the folder {found}?")


def test_a_hub_id_is_downloaded_once_and_by_whom_is_said(hub):
    hub.put("user/name", ADAPTER)
    folder = adapter_folder("user/name")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == ADAPTER
    assert "GET /user/name/resolve/main/adapter_config.json" in hub.asked
    assert all("veneer/" in agent for agent in hub.agents)
    hub.asked.clear()
    assert adapter_folder("user/name") == folder
    assert not any(line.startswith("GET") for line in hub.asked)


def test_a_config_alone_needs_no_weights(hub):
    hub.put("user/name", {CONFIG_FILE: b"{}"})
    assert [file.name for file in adapter_folder("user/name", weights=False).iterdir()] == [CONFIG_FILE]


def test_a_revision_is_a_branch_or_a_commit(hub):
    old = hub.put("user/name", ADAPTER)
    hub.put("user/name", {WEIGHTS_FILE: b"new"})
    hub.put("user/name", {**ADAPTER, WEIGHTS_FILE: b"tried"}, revision="try/this")
    read = {
        revision: (adapter_folder("user/name", revision=revision) / WEIGHTS_FILE).read_bytes()
        for revision in (None, "main", old, "try/this")
    }
    assert read == {None: b"new", "main": b"new", old: b"weights", "try/this": b"tried"}


def test_both_files_are_of_one_commit_though_somebody_pushes_in_between(hub):
    hub.put("user/name", ADAPTER)
    answer, put = hub.asked.append, hub.put

    class Asked(list):
        def append(self, line):
            answer(line)
            if line.startswith("HEAD") and line.endswith(WEIGHTS_FILE):
                put("user/name", {CONFIG_FILE: b"{1}", WEIGHTS_FILE: b"newer"})

    hub.asked = Asked()
    folder = adapter_folder("user/name")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == ADAPTER


def test_a_subfolder_is_read_and_found_when_it_is_forgotten_or_mistyped(hub):
    hub.put("user/name", {f"{where}/{file}": data for where in ("poet", "judge") for file, data in ADAPTER.items()})
    assert (adapter_folder("user/name", subfolder="poet") / WEIGHTS_FILE).read_bytes() == b"weights"
    listed = "; its adapters lie in folders: name one with subfolder= ('judge', 'poet')"
    assert message_of("user/name") == f"user/name has no {CONFIG_FILE}{listed}."
    assert message_of("user/name", subfolder="peot").endswith(f"{listed}, did you mean 'poet'?")


def test_a_subfolder_too_many_is_told(hub):
    hub.put("user/name", ADAPTER)
    assert message_of("user/name", subfolder="poet").endswith("lies in its main folder: leave subfolder out.")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": b"{}", "model.safetensors": b""}, "looks like a whole model, not an adapter. Load it with"),
        ({"pytorch_lora_weights.safetensors": b""}, "a LoRA of diffusers. Load it with load_lora_weights"),
        ({".gitattributes": b"", "notes.txt": b""}, "has no adapter_config.json; it holds notes.txt."),
        ({".gitattributes": b""}, "has no adapter_config.json; it is empty."),
    ],
)
def test_a_repository_without_an_adapter_is_told_what_it_is(hub, files, expected):
    hub.put("user/name", files)
    assert expected in message_of("user/name")


def test_weights_that_are_a_pickle_are_refused_with_a_way_out(hub):
    hub.put("user/name", {CONFIG_FILE: b"{}", PICKLE_FILE: b""})
    said = message_of("user/name")
    assert "as adapter_model.bin, a pickle" in said
    assert "convert it with safetensors.torch.save_file" in said
    assert f"GET /user/name/resolve/main/{PICKLE_FILE}" not in hub.asked
    hub.put("user/name", {f"poet/{CONFIG_FILE}": b"{}"})
    assert message_of("user/name", subfolder="poet").startswith(f"user/name, folder poet, has no {WEIGHTS_FILE}")


def test_a_private_repository_opens_to_its_owner(hub, monkeypatch):
    hub.put("user/name", ADAPTER, private=True)
    refused = "There is no folder user/name here, and no repository user/name on the hub that is open to you. "
    assert message_of("user/name") == f"{refused}If it is private, log in with `hf auth login` or pass token=."
    elsewhere = f"{refused}If it is private, the account of your token has no access to it."
    assert message_of("user/name", token="hf_other") == elsewhere
    assert "the token is not valid: log in" in message_of("user/name", token="hf_wrong")
    assert adapter_folder("user/name", token="hf_user").is_dir()
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    assert adapter_folder("user/name", force_download=True).is_dir()


def test_a_repository_that_is_not_there_reads_as_a_private_one(hub):
    assert "no repository user/nothing on the hub that is open to you" in message_of("user/nothing")


def test_a_gated_repository_says_where_to_ask(hub):
    hub.put("user/name", ADAPTER, gated=True)
    for token in (None, "hf_other"):
        said = message_of("user/name", token=token)
        assert said.startswith(f"user/name is gated: ask for access at {hub.url}/user/name, then log in")
    assert adapter_folder("user/name", token="hf_user").is_dir()


def test_a_revision_that_is_not_there_is_named(hub):
    hub.put("user/name", ADAPTER)
    assert message_of("user/name", revision="v9") == "The repository user/name on the hub has no revision 'v9'."


@pytest.mark.parametrize(
    ("status", "expected"),
    [(403, "your token has no right to it"), (429, "asked too often"), (503, "answers 503. Try again later.")],
)
def test_a_hub_that_refuses_or_fails(hub, no_waiting, status, expected):
    hub.fails = status
    assert expected in message_of("user/name")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_without_a_connection_the_address_is_named(hub, no_waiting, monkeypatch, endpoint):
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    said = message_of("user/name")
    assert said.startswith("There is no folder user/name here, and it could not be downloaded from the hub: ")
    assert f"{endpoint} cannot be reached (" in said
    assert said.endswith("Check the connection. Without a connection, name a folder that holds the adapter.")


def test_offline_the_cache_is_read_and_nothing_asked(hub, monkeypatch):
    hub.put("user/name", ADAPTER)
    folder = adapter_folder("user/name")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert adapter_folder("user/name") == folder
    said = message_of("user/other")
    assert said == (
        f"There is no folder user/other here, and it is not in the cache {constants.HF_HUB_CACHE}. HF_HUB_OFFLINE is "
        "set, so nothing is downloaded: unset it."
    )
    assert "HF_HUB_OFFLINE is set" in message_of("user/name", force_download=True)
    assert hub.asked == []


def test_local_files_alone_are_what_was_downloaded_before(hub, tmp_path):
    hub.put("user/name", ADAPTER)
    said = message_of("user/name", local_files_only=True, cache_dir=tmp_path / "mine")
    assert said.endswith(
        f"it is not in the cache {tmp_path / 'mine'}. Without local_files_only=True it would be downloaded."
    )
    assert hub.asked == []
    folder = adapter_folder("user/name", cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine") in folder.parents
    assert adapter_folder("user/name", cache_dir=tmp_path / "mine", local_files_only=True) == folder


def test_forced_files_are_downloaded_again(hub):
    hub.put("user/name", ADAPTER)
    adapter_folder("user/name")
    hub.asked.clear()
    adapter_folder("user/name", force_download=True)
    assert sum(line.startswith("GET") for line in hub.asked) == 2
    assert "opposite things" in message_of("user/name", force_download=True, local_files_only=True)


def test_a_cache_that_cannot_be_written_is_told(hub, tmp_path):
    hub.put("user/name", ADAPTER)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in message_of("user/name", cache_dir=tmp_path / "file" / "cache")


def test_an_unknown_option_is_named(hub):
    assert message_of("user/name", revison="v1").startswith("Unknown option revison; for the hub there are revision")


def test_what_is_said_of_the_base_in_the_same_call_changes_nothing(tmp_path):
    assert adapter_folder(tmp_path, device_map="auto", torch_dtype="float16", trust_remote_code=True) == tmp_path


def test_the_hub_takes_every_option():
    assert set(HUB_OPTIONS) <= set(inspect.signature(huggingface_hub.hf_hub_download).parameters)


def test_a_file_is_there_or_not(hub, tmp_path):
    hub.put("user/name", ADAPTER)
    assert holds("user/name", CONFIG_FILE)
    assert not holds("user/name", "tokenizer_config.json")
    assert not holds(tmp_path, CONFIG_FILE)
    with pytest.raises(AdapterFileError, match="no repository user/nothing"):
        holds("user/nothing", CONFIG_FILE)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("user/name", True), ("user/name.v1-x", True), ("name", False), ("a/b/c", False), ("/a/b", False), ("./b", False)],
)
def test_what_a_hub_id_is(text, answer):
    assert is_hub_id(text) is answer

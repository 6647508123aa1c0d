import inspect
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from veneer.errors import AdapterFileError
from veneer.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from veneer.storage.hub import HUB_OPTIONS, adapter_folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that notes what is asked of it, and fails as told."""
    asked = []

    def download(repository, file, *, subfolder=None, **options):
        asked.append((repository, file, subfolder, options))
        if download.error is not None:
            raise download.error
        return str(tmp_path / (subfolder or "") / file)

    download.error = None
    download.asked = asked
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return download


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
    with pytest.raises(AdapterFileError, match="There is no folder .*not a hub id|cannot be read: File name too long"):
        adapter_folder(location)
    assert hub.asked == []


def test_a_hub_id_is_downloaded(hub, tmp_path):
    folder = adapter_folder("user/name", subfolder="sub", revision="v1", token=None, local_files_only=True)
    options = {"revision": "v1", "local_files_only": True}
    assert folder == tmp_path / "sub"
    assert hub.asked == [("user/name", CONFIG_FILE, "sub", options), ("user/name", WEIGHTS_FILE, "sub", options)]


def test_a_config_alone_needs_no_weights(hub):
    adapter_folder("user/name", weights=False)
    assert [file for _, file, _, _ in hub.asked] == [CONFIG_FILE]


def test_an_unknown_option_is_named(hub):
    with pytest.raises(AdapterFileError, match="Unknown option revison; for the hub there are revision, token"):
        adapter_folder("user/name", revison="v1")


def test_the_hub_takes_every_option():
    assert set(HUB_OPTIONS) <= set(inspect.signature(huggingface_hub.hf_hub_download).parameters)


def made(error, *args):
    """Errors of the hub want a response that these tests do not have."""
    instance = error.__new__(error)
    Exception.__init__(instance, *args)
    return instance


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            made(RepositoryNotFoundError, "401 Client Error. Repository Not Found.\nmore"),
            "401 Client Error. Repository Not",
        ),
        (made(EntryNotFoundError, "404 Client Error. Entry Not Found"), "404 Client Error"),
        (
            LocalEntryNotFoundError("Cannot find the requested files in the disk cache"),
            "Cannot find the requested files",
        ),
        (OfflineModeIsEnabled("Cannot reach hub: offline mode is enabled."), "offline mode is enabled"),
        (HFValidationError("Repo id must use alphanumeric chars"), "Repo id must use alphanumeric"),
        (ConnectionError(), "ConnectionError"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_failed_download_is_one_plain_line(hub, error, expected):
    hub.error = error
    with pytest.raises(AdapterFileError) as caught:
        adapter_folder("user/name")
    message = str(caught.value)
    assert message.startswith("There is no folder user/name, and it could not be downloaded from the hub: ")
    assert expected in message
    assert len(message.splitlines()) == 1


def test_offline_nothing_is_asked_of_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterFileError, match="There is no folder user/name, and it could not be downloaded"):
        adapter_folder("user/name", cache_dir=str(tmp_path))

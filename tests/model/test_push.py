"""Adapters to the hub and back, against a hub of our own."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from veneer import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, load_peft_weights
from veneer.errors import AdapterFileError, AdapterNameError, ArgumentError, ConfigError, VeneerWarning
from veneer.integrations.transformers import add_adapter, load_adapter
from veneer.model.push import push_folder
from veneer.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE

# huggingface_hub hands its HTTP client a file in a way that the client calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FILES = {".gitattributes", "README.md", CONFIG_FILE, WEIGHTS_FILE}
TOKENS = torch.arange(12).reshape(2, 6)
CONFIG = LoraConfig(
    r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", base_model_name_or_path="base/one"
)


def trained(config: LoraConfig = CONFIG) -> PeftModel:
    model = get_peft_model(tiny.llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture
def pushed(hub, monkeypatch):
    """A hub on which "user/poet" holds an adapter, and its outputs. This process is logged in as its owner."""
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    model = trained()
    hub.info = model.push_to_hub("user/poet")
    return hub, logits(model)


def test_what_was_pushed_loads_by_every_way(pushed, tmp_path):
    hub, expected = pushed
    assert set(hub["user/poet"].files()) == FILES
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), "user/poet")), expected)
    model = trained()
    model.load_adapter("user/poet", "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), expected)
    in_place = tiny.llama()
    load_adapter(in_place, "user/poet")
    assert torch.equal(logits(in_place), expected)
    tiny.llama().save_pretrained(tmp_path / "base")
    config = json.loads(hub["user/poet"].files()[CONFIG_FILE])
    hub.put(
        "user/poet", {CONFIG_FILE: json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")}).encode()}
    )
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("user/poet")), expected)
    assert LoraConfig.from_pretrained("user/poet").r == 4
    assert all(key.startswith("base_model.model.model.layers") for key in load_peft_weights("user/poet"))


@pytest.mark.parametrize(
    "load",
    [
        lambda where, **hub: PeftModel.from_pretrained(tiny.llama(), where, **hub),
        lambda where, **hub: trained().load_adapter(where, "other", **hub),
        lambda where, **hub: load_adapter(tiny.llama(), where, **hub),
        LoraConfig.from_pretrained,
        load_peft_weights,
        AutoPeftModelForCausalLM.from_pretrained,
    ],
    ids=["PeftModel", "load_adapter", "in place", "LoraConfig", "load_peft_weights", "AutoPeftModel"],
)
def test_every_way_of_loading_takes_the_options_of_the_hub(pushed, load, tmp_path, monkeypatch):
    hub, _ = pushed
    files = hub["user/poet"].files()
    hub.put("user/secret", {f"in/{name}": data for name, data in files.items()}, revision="v1", private=True)
    tiny.llama().save_pretrained(tmp_path / "base")
    config = json.loads(files[CONFIG_FILE]) | {"base_model_name_or_path": str(tmp_path / "base")}
    hub.put("user/secret", {f"in/{CONFIG_FILE}": json.dumps(config).encode()}, revision="v1")
    monkeypatch.delenv("HF_TOKEN")
    where = {"revision": "v1", "subfolder": "in", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(AdapterFileError, match="open to you"):
        load("user/secret", **where)
    load("user/secret", **where, token="hf_user", force_download=True)
    hub.asked.clear()
    load("user/secret", **where, local_files_only=True)
    assert hub.asked == []


def test_the_commit_is_told_and_says_what_was_asked(pushed):
    hub, _ = pushed
    assert isinstance(hub.info, huggingface_hub.CommitInfo)
    assert hub.info.oid == hub["user/poet"].sha_of("main")
    assert hub["user/poet"].messages[-1] == ("Upload adapter", "")
    trained().push_to_hub("user/poet", commit_message="Better", commit_description="by far")
    assert hub["user/poet"].messages[-1] == ("Better", "by far")
    assert any("veneer/" in agent for agent in hub.agents)


def test_a_new_repository_is_private_where_asked_and_a_name_alone_is_ones_own(hub):
    trained().push_to_hub("mine", private=True, token="hf_user")
    assert hub["user/mine"].private
    trained().push_to_hub("other/theirs", token="hf_other")
    assert not hub["other/theirs"].private


def test_a_branch_is_made_and_a_proposal_too(pushed):
    hub, _ = pushed
    before = dict(hub["user/poet"].refs)
    trained().push_to_hub("user/poet", revision="v2", commit_message="second")
    assert hub["user/poet"].refs["main"] == before["main"]
    assert PeftModel.from_pretrained(tiny.llama(), "user/poet", revision="v2").peft_config["default"].r == 4
    info = trained().push_to_hub("user/poet", token="hf_other", create_pr=True)
    assert info.pr_url == f"{hub.url}/user/poet/discussions/1"
    assert PeftModel.from_pretrained(tiny.llama(), "user/poet", revision="refs/pr/1")


def test_several_adapters_go_to_folders_of_their_names(pushed):
    hub, _ = pushed
    model = trained()
    model.add_adapter("judge", CONFIG)
    model.push_to_hub("user/two", tags=["poetry"])
    assert set(hub["user/two"].files()) == FILES | {f"judge/{CONFIG_FILE}", f"judge/{WEIGHTS_FILE}"}
    PeftModel.from_pretrained(tiny.llama(), "user/two", subfolder="judge")
    card = ModelCard(hub["user/two"].files()["README.md"].decode())
    assert card.data.tags == ["base_model:adapter:base/one", "lora", "transformers", "veneer", "poetry"]
    assert "Folders with an adapter: `.`, `judge`. Described here: `.`." in card.text
    model.set_adapter("judge")
    model.delete_adapter("default")
    model.push_to_hub("user/one")
    files = hub["user/one"].files()
    assert set(files) == {".gitattributes", "README.md", f"judge/{CONFIG_FILE}", f"judge/{WEIGHTS_FILE}"}
    assert "from_pretrained(\"user/one\", subfolder='judge')" in files["README.md"].decode()


def test_the_card_in_the_repository_keeps_what_was_written_there(pushed):
    hub, _ = pushed
    text = hub["user/poet"].files()["README.md"].decode()
    assert 'AutoPeftModelForCausalLM.from_pretrained("user/poet")' in text
    mine = text.replace("Not stated yet", "Stated: MIT").replace(
        "library_name: peft", "license: mit\nlibrary_name: peft"
    )
    hub.put("user/poet", {"README.md": mine.encode()})
    trained(CONFIG.changed(r=8)).push_to_hub("user/poet")
    after = hub["user/poet"].files()["README.md"].decode()
    assert "Stated: MIT" in after
    assert ModelCard(after).data.license == "mit"
    assert "| rank (`r`) | 8 |" in after
    foreign = b"# My own page\n"
    hub.put("user/poet", {"README.md": foreign})
    trained().push_to_hub("user/poet")
    after = hub["user/poet"].files()["README.md"]
    assert after.endswith(b"---\n\n# My own page\n")
    assert ModelCard(after.decode()).data.base_model == "base/one"


def test_saving_pushes_too(pushed, tmp_path):
    hub, _ = pushed
    trained().save_pretrained(tmp_path / "verse", push_to_hub=True, private=True, commit_message="saved")
    assert hub["user/verse"].private
    assert hub["user/verse"].messages[-1][0] == "saved"
    assert {file.name for file in (tmp_path / "verse").iterdir()} == FILES - {".gitattributes"}
    trained().save_pretrained(tmp_path / "verse", push_to_hub=True, repo_id="user/named")
    assert set(hub["user/named"].files()) == FILES
    with pytest.raises(ArgumentError, match="takes repo_id only with push_to_hub=True"):
        trained().save_pretrained(tmp_path / "verse", repo_id="user/named")
    with pytest.raises(AdapterFileError, match="Unknown option repo_name"):
        trained().save_pretrained(tmp_path / "other", push_to_hub=True, repo_name="user/named")
    assert not (tmp_path / "other").exists()


def test_a_model_adapted_in_place_pushes_its_adapter(pushed, tmp_path):
    hub, expected = pushed
    model = tiny.llama()
    load_adapter(model, "user/poet")
    info = model.push_to_hub("user/again", commit_message="again")
    assert hub["user/again"].messages[-1][0] == "again"
    assert info.oid == hub["user/again"].sha_of("main")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), "user/again")), expected)
    model.save_pretrained(tmp_path / "third", push_to_hub=True, max_shard_size="5GB")
    assert hub["user/third"].files()[CONFIG_FILE] == hub["user/again"].files()[CONFIG_FILE]
    assert set(hub["user/third"].files()) == FILES


def test_a_config_alone_is_pushed(pushed):
    hub, _ = pushed
    CONFIG.push_to_hub("user/config")
    assert set(hub["user/config"].files()) == {".gitattributes", CONFIG_FILE}
    assert hub["user/config"].messages[-1][0] == "Upload config"
    assert LoraConfig.from_pretrained("user/config") == CONFIG


def test_merged_or_not_adapted_models_push_as_transformers_do(pushed):
    hub, expected = pushed
    merged = PeftModel.from_pretrained(tiny.llama(), "user/poet").merge_and_unload()
    merged.push_to_hub("user/merged")
    assert "model.safetensors" in hub["user/merged"].files()
    again = AutoModelForCausalLM.from_pretrained("user/merged")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("repository", "options", "expected"),
    [
        (
            "other/x",
            {"token": "hf_user"},
            "your token may not write there. Is it a write token, and is the name",
        ),
        ("user/x", {"token": "hf_reader"}, "your token may not write there"),
        ("user/x", {"token": False}, "the hub does not know who you are: log in with `hf auth login` or pass token="),
        ("user/x", {"token": "hf_wrong"}, "the token is not valid: log in"),
        ("x", {"token": "hf_wrong"}, "the token is not valid: log in"),
        ("a/b/c", {"token": "hf_user"}, "'a/b/c' is not a hub id"),
        ("user/x", {"token": "hf_user", "revision": "refs/pr/9"}, "the repository has no revision 'refs/pr/9'"),
    ],
)
def test_a_push_that_is_refused_says_what_to_do(hub, repository, options, expected):
    with pytest.raises(AdapterFileError) as caught:
        trained().push_to_hub(repository, **options)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("Not pushed")
    assert len(str(caught.value).splitlines()) == 1
    assert all(len(found.messages) == 1 for found in hub.repositories.values())


def test_without_a_token_or_offline_nothing_is_pushed(hub, monkeypatch):
    with pytest.raises(AdapterFileError, match="the hub does not know who you are: log in"):
        trained().push_to_hub("x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    with pytest.raises(AdapterFileError, match="Not pushed to user/x: HF_HUB_OFFLINE is set. Unset it."):
        trained().push_to_hub("user/x", token="hf_user")
    assert hub.asked == []


def test_what_cannot_be_saved_reaches_no_repository(hub):
    model = trained()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match="NaN"):
        model.push_to_hub("user/poet", token="hf_user")
    with pytest.raises(ConfigError, match="pickle"):
        trained().push_to_hub("user/poet", token="hf_user", safe_serialization=False)
    model.delete_adapter("default")
    with pytest.raises(AdapterNameError, match="nothing to push"):
        model.push_to_hub("user/poet", token="hf_user")
    assert hub.repositories == {}


def test_a_base_that_only_this_machine_has_is_warned_of_and_not_shown(hub, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "my-base")
    model = trained(CONFIG.changed(base_model_name_or_path=str(tmp_path / "my-base")))
    with pytest.warns(VeneerWarning, match="a folder of this machine: others cannot load it by that name"):
        model.push_to_hub("user/poet", token="hf_user")
    card = hub["user/poet"].files()["README.md"].decode()
    assert str(tmp_path) not in card
    assert "path/to/my-base" in card
    assert ModelCard(card).data.base_model is None


def test_a_folder_is_pushed_without_what_only_a_resumed_run_needs(hub, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "a" / "checkpoint-1").mkdir()
    push_folder(tmp_path / "a", "user/a", token="hf_user")
    assert set(hub["user/a"].files()) == {*FILES, "tokenizer_config.json"}
    (tmp_path / "a" / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(AdapterFileError, match="model.safetensors"):
        push_folder(tmp_path / "a", "user/b", token="hf_user")
    assert "user/b" not in hub.repositories


def test_adapters_in_place_need_one_that_acts(hub):
    model = tiny.llama()
    add_adapter(model, CONFIG)
    model.disable_adapters()
    model.enable_adapters()
    model.push_to_hub("user/a", token="hf_user")
    assert "user/a" in hub.repositories

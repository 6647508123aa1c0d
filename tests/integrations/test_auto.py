"""An adapter loaded together with its base."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import veneer
from parity.oracle import quietly
from train import tiny_chat
from veneer.errors import AdapterFileError, ArgumentError, ConfigError, VeneerWarning

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def base(tmp_path) -> Path:
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, folder: Path, **fields) -> torch.Tensor:
    """Save an adapter over the base; returns the logits it gives."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    adapted = tiny.shake(veneer.get_peft_model(model, veneer.LoraConfig(target_modules=TARGETS, **fields)))
    adapted.save_pretrained(folder)
    return adapted.eval()(tiny.ids()).logits


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_base_and_adapter_in_one_call(base, tmp_path, name):
    expected = adapter(base, tmp_path / "a", task_type="CAUSAL_LM")
    model = getattr(veneer, name).from_pretrained(str(tmp_path / "a"))
    assert type(model) is veneer.PeftModelForCausalLM
    assert torch.equal(model(tiny.ids()).logits, expected)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_peft_gives_the_same(base, tmp_path):
    import peft

    adapter(base, tmp_path / "a", task_type="CAUSAL_LM")
    theirs = quietly(peft.AutoPeftModelForCausalLM.from_pretrained, str(tmp_path / "a"))
    ours = veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(ours(tiny.ids()).logits, theirs(tiny.ids()).logits)


def test_what_is_passed_on(base, tmp_path):
    adapter(base, tmp_path / "a" / "inner", task_type="CAUSAL_LM")
    model = veneer.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "a", "mine", is_trainable=True, subfolder="inner", dtype=torch.bfloat16
    )
    assert list(model.peft_config) == ["mine"]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_a_classifiers_head_comes_from_the_adapter(tmp_path):
    from transformers import BertModel

    torch.manual_seed(0)
    BertModel(tiny.bert().config).save_pretrained(tmp_path / "base")
    whole = tiny.bert()
    whole.name_or_path = str(tmp_path / "base")
    whole.bert.load_state_dict(BertModel.from_pretrained(tmp_path / "base").state_dict())
    config = veneer.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    trained = tiny.shake(veneer.get_peft_model(whole, config)).eval()
    trained.save_pretrained(tmp_path / "a")
    model = veneer.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert torch.equal(model(tiny.ids()).logits, trained(tiny.ids()).logits)


def test_without_a_task_the_base_says_what_it_is(base, tmp_path):
    expected = adapter(base, tmp_path / "a")
    for mapping in (None, {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}):
        edit(tmp_path / "a", auto_mapping=mapping)
        model = veneer.AutoPeftModel.from_pretrained(tmp_path / "a")
        assert type(model) is veneer.PeftModel
        assert torch.equal(model(tiny.ids()).logits, expected)


def test_a_library_named_in_a_file_is_not_imported(base, tmp_path):
    adapter(base, tmp_path / "a")
    edit(tmp_path / "a", auto_mapping={"base_model_class": "Popen", "parent_library": "subprocess"})
    with pytest.raises(ConfigError, match="only classes of transformers"):
        veneer.AutoPeftModel.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("AutoPeftModelForSequenceClassification", {}, "AutoPeftModelForCausalLM.from_pretrained"),
        ("AutoPeftModel", {"base_model_name_or_path": None}, "does not name its base model"),
        ("AutoPeftModel", {"base_model_name_or_path": "HERE"}, "an adapter folder itself"),
    ],
)
def test_what_cannot_be_loaded(base, tmp_path, name, changes, text):
    adapter(base, tmp_path / "a", task_type="CAUSAL_LM")
    edit(tmp_path / "a", **{key: str(tmp_path / "a") if value == "HERE" else value for key, value in changes.items()})
    with pytest.raises(ConfigError, match=text):
        getattr(veneer, name).from_pretrained(tmp_path / "a")


def test_it_is_not_made_itself():
    with pytest.raises(ArgumentError, match="AutoPeftModelForCausalLM.from_pretrained"):
        veneer.AutoPeftModelForCausalLM()


def test_no_adapter_there(tmp_path):
    with pytest.raises(AdapterFileError, match="There is no"):
        veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nothing")


class TestATokenizerBesideTheAdapter:
    """The base has 64 rows, the tokenizer 259 tokens."""

    TOKENS = 259

    @pytest.fixture
    def resized(self, base, tmp_path) -> torch.Tensor:
        """An adapter trained over a base with more rows; returns its logits."""
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(self.TOKENS)
        config = veneer.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = tiny.shake(veneer.get_peft_model(model, config)).eval()
        self.model.save_pretrained(tmp_path / "a")
        tiny_chat.tokenizer().save_pretrained(tmp_path / "a")
        return self.model(tiny.ids(self.TOKENS)).logits

    def test_the_rows_come_from_the_file(self, resized, tmp_path):
        file = tmp_path / "a" / "adapter_model.safetensors"
        whole = veneer.get_peft_model_state_dict(self.model, save_embedding_layers=True)
        assert len(whole) == len(load_file(file)) + 2
        save_file({key: value.clone() for key, value in whole.items()}, file)
        model = veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
        assert torch.equal(model(tiny.ids(self.TOKENS)).logits, resized)

    def test_rows_that_nobody_has_are_noticed(self, resized, tmp_path):
        with pytest.warns(VeneerWarning, match="embed_tokens, lm_head got 195 new rows"):
            model = veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
        assert model.get_base_model().lm_head.weight.shape[0] == self.TOKENS

    def test_a_smaller_tokenizer_changes_nothing(self, tmp_path):
        torch.manual_seed(0)
        model = tiny.llama()
        model.resize_token_embeddings(300)
        model.save_pretrained(tmp_path / "base")
        adapter(tmp_path / "base", tmp_path / "a", task_type="CAUSAL_LM")
        tiny_chat.tokenizer().save_pretrained(tmp_path / "a")
        loaded = veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
        assert loaded.get_base_model().lm_head.weight.shape[0] == 300


def test_weights_that_neither_has_are_noticed(base, tmp_path):
    adapter(base, tmp_path / "a", task_type="CAUSAL_LM")
    file = base / "model.safetensors"
    left = {key: value for key, value in load_file(file).items() if "layers.1.mlp.up_proj" not in key}
    save_file(left, file, metadata={"format": "pt"})
    with pytest.warns(VeneerWarning, match="1 tensors, which are random: model.layers.1.mlp.up_proj.weight"):
        veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")

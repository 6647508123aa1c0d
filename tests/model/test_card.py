"""What a model card says, and when it is written."""

import pytest
from huggingface_hub import ModelCard
from torch import nn

import tiny
from veneer import LoraConfig, get_peft_model
from veneer.errors import AdapterNameError
from veneer.integrations.transformers import add_adapter
from veneer.model.card import base_of
from veneer.model.card_loading import VLLM_RANKS, refused_by_vllm
from veneer.model.contents import contents_of

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def card(folder, **fields) -> ModelCard:
    config = LoraConfig(**{**CONFIG, "base_model_name_or_path": "base/one", **fields})
    get_peft_model(tiny.llama(), config).save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_the_metadata_is_what_the_hub_and_trainer_look_for(tmp_path):
    assert card(tmp_path).data.to_dict() == {
        "base_model": "base/one",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:base/one", "lora", "transformers", "veneer"],
    }


def test_it_counts_what_is_trained(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(**CONFIG))
    trained, both = model.get_nb_trainable_parameters()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (
        f"It holds {trained:,} trained numbers, {100 * trained / (both - trained):.2g} % of the {both - trained:,} of"
        in text
    )
    assert "| adapted | `q_proj` × 2 |" in text
    assert "| scale of the update | 2 |" in text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"use_dora": True},
            ["A DoRA adapter", "vLLM does not read this adapter (DoRA): merge it into its base first."],
        ),
        ({"use_rslora": True}, ["A rank-stabilised LoRA adapter", "| scale of the update | 4 |"]),
        ({"lora_dropout": 0.1}, ["| dropout | 0.1 |"]),
        ({"modules_to_save": ["lm_head"]}, ["| trained in full | `lm_head` |", "(modules trained in full): merge"]),
        ({"lora_bias": True}, ["(trained biases): merge"]),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 9}}, ["| rank (`r`) | 4, 9 |", "--max-lora-rank 16 "]),
        (
            {"init_lora_weights": "pissa"},
            ["| rank (`r`) | 8 |", "vllm serve base/one --enable-lora --max-lora-rank 8 "],
        ),
        ({"trainable_token_indices": [1, 2]}, ["(trained tokens): merge"]),
        ({"revision": "v2"}, ["(https://huggingface.co/base/one) (revision `v2`)"]),
        ({"task_type": None}, ['PeftModel.from_pretrained(base, "path/to/this/adapter")']),
        ({"task_type": "SEQ_2_SEQ_LM"}, ["from transformers import AutoModelForSeq2SeqLM"]),
    ],
)
def test_it_says_what_is_particular(tmp_path, fields, said):
    text = card(tmp_path, **fields).text
    for words in said:
        assert words in text


@pytest.mark.filterwarnings("ignore:2 layer.s. get a rank above")
def test_a_rank_that_vllm_cannot_serve_is_to_be_merged(tmp_path):
    assert "a rank above 512" in card(tmp_path, r=VLLM_RANKS[-1] + 1).text


def test_a_card_is_renewed_and_keeps_what_was_written_into_it(tmp_path):
    card(tmp_path)
    file = tmp_path / "README.md"
    file.write_text(file.read_text() + "\n## How it behaves\n\nWell.\n")
    again = card(tmp_path, r=6)
    assert "| rank (`r`) | 6 |" in again.text
    assert "| rank (`r`) | 4 |" not in again.text
    assert again.text.endswith("## How it behaves\n\nWell.\n")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_a_start_that_changes_the_base_is_not_for_vllm(start):
    contents = contents_of({}, {})
    assert refused_by_vllm({"r": 4, "init_lora_weights": start}, contents) == ["a start that changes the base"]
    assert refused_by_vllm({"r": 4, "init_lora_weights": "gaussian"}, contents) == []


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "a" / "README.md").symlink_to(tmp_path / "secret")
    get_peft_model(tiny.llama(), LoraConfig(**CONFIG)).save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").is_symlink()
    assert (tmp_path / "secret").read_text() == "secret"


def test_one_card_for_several_adapters_lies_in_the_main_folder(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(**CONFIG))
    model.add_adapter("judge", LoraConfig(**{**CONFIG, "r": 3}))
    model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both" / "judge" / "README.md").exists()
    assert "| rank (`r`) | 4 |" in (tmp_path / "both" / "README.md").read_text()
    model.save_pretrained(tmp_path / "one", selected_adapters=["judge"])
    text = (tmp_path / "one" / "README.md").read_text()
    assert "Folders with an adapter: `judge`." in text
    assert "| rank (`r`) | 3 |" in text


@pytest.mark.parametrize("in_place", [False, True])
def test_trainer_asks_the_model_for_its_card(tmp_path, in_place):
    model = tiny.llama()
    if in_place:
        add_adapter(model, LoraConfig(**CONFIG))
        asked = model
    else:
        asked = get_peft_model(model, LoraConfig(**CONFIG))
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# by Trainer\n")
    asked.create_or_update_model_card(str(tmp_path))
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.library_name == "peft"
    assert found.text == "\n# by Trainer\n"
    asked.create_or_update_model_card(tmp_path / "new")
    assert "| rank (`r`) | 4 |" in (tmp_path / "new" / "README.md").read_text()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["README.md"]


def test_without_an_adapter_there_is_no_card(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(**CONFIG))
    model.delete_adapter("default")
    with pytest.raises(AdapterNameError):
        model.create_or_update_model_card(tmp_path)


def test_a_model_of_plain_torch_has_a_card_too(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.to_dict() == {"library_name": "peft", "tags": ["lora", "veneer"]}
    assert "A LoRA adapter for a model that the adapter does not name." in found.text


def test_other_adapters_are_not_counted_to_the_base():
    base = tiny.llama()
    numbers = sum(value.numel() for value in base.parameters())
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    assert base_of(model.get_base_model()).numbers == numbers

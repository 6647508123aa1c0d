from pathlib import Path

import pytest
import torch

from train.tiny_chat import model, tokenizer
from veneer import LoraConfig, get_peft_model
from veneer.errors import AdapterFileError, RunError
from veneer.train.adapted import is_adapter, load_adapted


@pytest.fixture
def adapter(chat_model: Path, tmp_path: Path) -> Path:
    made = get_peft_model(model(), LoraConfig(r=4, init_lora_weights=False, base_model_name_or_path=str(chat_model)))
    made.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_the_model_is_the_one_the_adapter_names(adapter: Path, chat_model: Path) -> None:
    loaded = load_adapted(str(adapter))
    assert loaded.base == str(chat_model)
    ids = torch.arange(3, 9).unsqueeze(0)
    assert not torch.equal(loaded.model(input_ids=ids).logits, model()(input_ids=ids).logits)


def test_the_tokenizer_beside_the_adapter_wins(adapter: Path) -> None:
    assert load_adapted(str(adapter)).tokenizer.chat_template == tokenizer().chat_template
    tokenizer("{{ 'other' }}").save_pretrained(adapter)
    assert load_adapted(str(adapter)).tokenizer.chat_template == "{{ 'other' }}"


def test_a_model_folder_is_not_an_adapter(chat_model: Path, adapter: Path) -> None:
    assert is_adapter(str(adapter))
    assert not is_adapter(str(chat_model))
    with pytest.raises(AdapterFileError):
        load_adapted(str(chat_model))


def test_an_adapter_is_not_a_base(adapter: Path) -> None:
    tokenizer().save_pretrained(adapter)
    with pytest.raises(RunError, match="holds an adapter, not a model"):
        load_adapted(str(adapter), base=str(adapter))

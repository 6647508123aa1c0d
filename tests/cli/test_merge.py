"""`veneer merge` where a base is quantised: by itself, or only for the adapter's training."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer.cli import main

ao = pytest.importorskip("torchao.quantization")


def quantised(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(ao.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, device_map="auto", quantization_config=config)


@pytest.fixture
def adapter(chat_model: Path, tmp_path: Path) -> Path:
    """An adapter that was made over a quantised base."""
    model = veneer.get_peft_model(quantised(chat_model), veneer.LoraConfig(r=4, task_type="CAUSAL_LM"))
    tiny.shake(model, std=0.05).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def few_bits(chat_model: Path, tmp_path: Path) -> Path:
    """The base's files in few bits, with the tokenizer."""
    from transformers import AutoTokenizer

    quantised(chat_model).save_pretrained(tmp_path / "few-bits")
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "few-bits")
    return tmp_path / "few-bits"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["merge", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_an_adapter_trained_over_few_bits_is_merged_into_the_base_in_full(adapter, chat_model, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    code, _, err = run(capsys, adapter, "--into", tmp_path / "merged")
    assert (code, err) == (0, "")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(merged.config, "quantization_config", None)
    expected = veneer.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), adapter)
    with torch.no_grad():
        torch.testing.assert_close(merged(tiny.ids()).logits, expected(tiny.ids()).logits, atol=1e-4, rtol=1e-4)


def test_files_in_few_bits_need_a_word_more(adapter, few_bits, tmp_path, capsys):
    into, text = tmp_path / "merged", tmp_path / "sample.txt"
    text.write_text("say 3\nit is 3\n" * 40)
    code, _, err = run(capsys, adapter, "--into", into, "--base", few_bits)
    assert code == 2
    assert "are quantised, so merging needs a word more" in err
    assert "--base MODEL" in err
    assert "--requantize" in err
    assert not into.exists()
    code, out, err = run(capsys, adapter, "--into", into, "--base", few_bits, "--requantize", "--sample", text)
    assert (code, err) == (0, "")
    assert "quantised weights, which were rounded again" in out
    assert "nats a token, over" in out
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(into, device_map="auto")
    over = veneer.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(few_bits, device_map="auto"), adapter)
    with torch.no_grad():
        torch.testing.assert_close(merged(tiny.ids()).logits, over(tiny.ids()).logits, atol=0.05, rtol=0.1)


def test_options_without_an_effect(adapter, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    code, _, err = run(capsys, adapter, "--into", tmp_path / "m", "--sample", tmp_path / "empty.txt")
    assert code == 2
    assert "--sample goes with --requantize" in err
    code, _, err = run(capsys, adapter, "--into", tmp_path / "m", "--requantize", "--sample", tmp_path / "empty.txt")
    assert code == 2
    assert "is empty" in err
    code, _, err = run(capsys, adapter, "--into", tmp_path / "m", "--requantize")
    assert code == 2
    assert "leave requantize out" in err
    assert not (tmp_path / "m").exists()

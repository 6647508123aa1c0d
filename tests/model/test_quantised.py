"""Adapters over a base that transformers loads in 8 or 4 bits: the usual first script, on a CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import tiny
import veneer
from veneer.errors import AttachError, MergeError
from veneer.integrations.transformers import add_adapter
from veneer.layers.weights import read

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def loaded(folder: Path, bits: int = 8) -> nn.Module:
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", quantization_config=settings, dtype=torch.float32
    )


def config(**fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


def adapted(base: nn.Module, **fields) -> veneer.PeftModel:
    return veneer.get_peft_model(base, config(**fields), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny.ids()).logits


def test_the_quickstart(checkpoint, tmp_path, capsys):
    model = adapted(veneer.prepare_model_for_kbit_training(loaded(checkpoint)), lora_dropout=0.05)
    model.print_trainable_parameters()
    assert "trainable params: 1,792 || all params: 84,032" in capsys.readouterr().out
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(tiny.ids(), labels=tiny.ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(loaded(checkpoint), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.generate(tiny.ids(), max_new_tokens=3, do_sample=False).shape == (3, 10)
    assert veneer.get_model_status(again).quantization_backend == "bnb 8bit"


@pytest.mark.parametrize("in_place", [True, False])
def test_the_trainer_takes_it(checkpoint, tmp_path, in_place):
    base = veneer.prepare_model_for_kbit_training(loaded(checkpoint))
    if in_place:
        add_adapter(base, config())
    model = base if in_place else adapted(base)
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=in_place,  # it asks a facade's forward which columns there are
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny.ids(rows=8)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    Trainer(model=model, args=settings, train_dataset=rows).train()
    after = dict(model.named_parameters())
    assert before
    assert not any(torch.equal(after[name], value) for name, value in before.items() if "lora_B" in name)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_gradients_are_the_formulas_on_the_weight_that_is_read(checkpoint, fields):
    """The base itself rounds the inputs of each layer, so the two agree as far as that goes."""
    quantised = loaded(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for name, layer in quantised.named_modules():
            if type(layer).__name__ == "Linear8bitLt":
                plain.get_submodule(name).weight.copy_(read(layer))
    gradients = []
    for base in (quantised, plain):
        model = tiny.shake(adapted(base, **fields), std=0.05).train()
        model(tiny.ids(), labels=tiny.ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, formula in zip(*gradients, strict=True):
        assert_close(ours, formula, atol=float(2e-2 * formula.abs().max()), rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_reads_the_weight_starts_as_the_base(checkpoint, fields, bits):
    base = loaded(checkpoint, bits)
    before = logits(base)
    assert_close(logits(adapted(base, **fields)), before, atol=5e-3, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_says_what_to_do_instead(checkpoint, bits, tmp_path):
    model = tiny.shake(adapted(loaded(checkpoint, bits)))
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"q_proj is quantised .*Load the base unquantised.* and merge there"):
            merge()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    veneer.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path).merge_and_unload()


def test_loftq_makes_up_for_what_was_lost(checkpoint):
    base = loaded(checkpoint)
    with pytest.raises(AttachError, match="is quantised already; .* call replace_lora_weights_loftq"):
        adapted(base, init_lora_weights="loftq")
    model = adapted(base)
    veneer.replace_lora_weights_loftq(model, checkpoint)
    path = "model.layers.0.self_attn.q_proj"
    original = AutoModelForCausalLM.from_pretrained(checkpoint).get_submodule(path).weight
    layer = base.get_submodule(path)
    lost = original - read(layer)
    left = lost - layer.adapters["default"].delta(lost.shape, lost.dtype)
    assert left.norm() < 0.95 * lost.norm()

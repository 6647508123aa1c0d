"""Adapters over a base that transformers loads in few bits: the usual first script, on a CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import tiny
import veneer
from model.quantised import METHODS, adapted, config, loaded, logits, save_base
from veneer.errors import AttachError, MergeError
from veneer.integrations.transformers import add_adapter
from veneer.layers.weights import is_quantised, read, store_of

BACKENDS = {"bnb int8": "bnb 8bit", "bnb nf4": "bnb 4bit", "quanto int8": "quanto"}
BY_METHOD = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@BY_METHOD
def test_the_quickstart(checkpoint, tmp_path, capsys, method):
    model = adapted(veneer.prepare_model_for_kbit_training(loaded(checkpoint, method)), lora_dropout=0.05)
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
    again = veneer.PeftModel.from_pretrained(loaded(checkpoint, method), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again), logits(model))  # only to use, bitsandbytes may reorder and round 4 bits
    assert again.generate(tiny.ids(), max_new_tokens=3, do_sample=False).shape == (3, 10)
    status = veneer.get_model_status(again)
    assert status.quantization_backend == BACKENDS.get(method, "torchao")
    assert status.paths == {"fast": 4}


@pytest.mark.parametrize(("method", "in_place"), [("bnb int8", True), ("torchao int8", False), ("quanto int8", False)])
def test_the_trainer_takes_it(checkpoint, tmp_path, in_place, method):
    base = veneer.prepare_model_for_kbit_training(loaded(checkpoint, method))
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


FIELDS = (
    {},
    {"use_rslora": True, "target_modules": "all-linear"},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"modules_to_save": ["lm_head"]},
)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@BY_METHOD
def test_gradients_are_the_formulas_on_the_weight_that_is_read(checkpoint, fields, method):
    """bitsandbytes rounds the inputs of 8-bit layers itself in evaluation, so the two agree as far as that goes."""
    quantised = loaded(checkpoint, method)
    plain = dequantised(checkpoint, quantised)
    found = []
    for base in (quantised, plain):
        model = tiny.shake(adapted(base, **fields), std=0.05).train()
        loss = model(tiny.ids(), labels=tiny.ids()).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, formula in zip(*found, strict=True):
        assert_close(ours, formula, atol=float(1e-5 + 1e-4 * formula.detach().abs().max()), rtol=1e-3)


def dequantised(folder: Path, model: nn.Module) -> nn.Module:
    """The plain model with the weights that the quantised one reads."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if is_quantised(layer):
                plain.get_submodule(name).weight.copy_(read(layer))
    return plain


@BY_METHOD
@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_reads_the_weight_starts_as_the_base(checkpoint, fields, method):
    base = loaded(checkpoint, method)
    before = logits(base)
    assert_close(logits(adapted(base, **fields)), before, atol=5e-3, rtol=0)


@BY_METHOD
def test_loftq_makes_up_for_what_was_lost(checkpoint, method):
    base = loaded(checkpoint, method)
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


@BY_METHOD
def test_prepared_in_half_precision(checkpoint, method):
    base = veneer.prepare_model_for_kbit_training(loaded(checkpoint, method, torch.bfloat16))
    norms = torch.float32 if method.startswith("bnb") else torch.bfloat16  # the others' layers compute in one dtype
    assert base.model.norm.weight.dtype == base.lm_head.weight.dtype == norms
    assert not any(p.requires_grad for p in base.parameters())
    assert all(is_quantised(layer.self_attn.q_proj) for layer in base.model.layers)
    assert base.is_activation_checkpointing
    model = tiny.shake(adapted(base), std=0.05).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(tiny.ids(), labels=tiny.ids()).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    checkpointed = gradients()
    base.activation_checkpointing_disable()
    for one, other in zip(checkpointed, gradients(), strict=True):
        assert one.abs().max() > 0
        assert_close(one, other, atol=float(1e-2 * other.abs().max()), rtol=1e-2)


def test_prepared_though_transformers_does_not_know_that_it_is_quantised():
    ao = pytest.importorskip("torchao.quantization")
    model = tiny.llama(dtype=torch.bfloat16)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    veneer.prepare_model_for_kbit_training(model)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert store_of(model.lm_head).name == "torchao"
    assert model.is_activation_checkpointing


@BY_METHOD
def test_a_quantised_module_cannot_be_trained_in_full(checkpoint, method):
    base = loaded(checkpoint, method)
    before = logits(base)
    with pytest.raises(AttachError, match=r"modules_to_save: \S+gate_proj is quantised, .*modules_to_not_convert"):
        adapted(base, modules_to_save=["gate_proj"])
    assert torch.equal(logits(base), before)


def test_a_quantised_weight_that_is_not_there():
    ao = pytest.importorskip("torchao.quantization")
    model = tiny.llama()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    model.to("meta")
    for fields in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(MergeError, match="has no value here just now .* stays on a device"):
            adapted(model, **fields)


def test_several_adapters_rows_of_a_batch_and_none(checkpoint):
    """What does not take the fast path gives the same as what does."""
    base = loaded(checkpoint, "torchao int4")
    plain = logits(base)
    model = tiny.shake(adapted(base))
    model.add_adapter("other", config())
    one = logits(model)
    with torch.no_grad():
        names = ["default", "__base__", "other"]
        by_rows = model(tiny.ids(), adapter_names=names).logits
    assert_close(by_rows[0], one[0], atol=1e-4, rtol=1e-4)
    assert_close(by_rows[1], plain[1], atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert isinstance(model.unload(), LlamaForCausalLM)
    assert torch.equal(logits(base), plain)


@pytest.mark.parametrize("when", ["before", "between"])
def test_training_goes_on_after_an_evaluation(when, tmp_path):
    """bitsandbytes reorders weights in evaluation on some CPUs, and what it computes from those has no gradient."""
    folder = save_base(tmp_path)

    def gradient(evaluated: bool) -> Tensor:
        base = loaded(folder, "bnb nf4").eval()
        if evaluated and when == "before":
            logits(base)
        model = adapted(base, layers_to_transform=[0])  # below layers without an adapter
        if evaluated and when == "between":
            logits(model.eval())
        model.train()(tiny.ids(), labels=tiny.ids()).loss.backward()
        return model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.adapters.default.lora_B").grad

    expected = gradient(evaluated=False)
    assert_close(gradient(evaluated=True), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))

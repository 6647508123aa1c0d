"""Merging into a quantised base: into its original, or rounded again when asked, with what that costs."""

import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import tiny
import veneer
from model.quantised import METHODS, adapted, config, loaded, logits, save_base
from veneer.errors import AdapterNameError, ArgumentError, MergeError, VeneerWarning
from veneer.layers.weights import is_quantised, read

BY_METHOD = pytest.mark.parametrize("method", METHODS)
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def rounded_again():
    return pytest.warns(VeneerWarning, match=r"Merged into \d+ quantised weights, which were rounded again")


def into_original():
    return pytest.warns(VeneerWarning, match=r"merged into its original, from .*, in float32\. Pass requantize=True")


def weights(model):
    """Every weight of the base as it is read."""
    layers = [module for module in model.modules() if "weight" in module._parameters]
    return [read(layer).clone() for layer in layers]


def settled(model):
    """The logits once bitsandbytes has reordered 4-bit weights for a CPU, which rounds their scales."""
    logits(model)
    return logits(model)


@BY_METHOD
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_by_default_the_original_takes_the_adapter_in(checkpoint, tmp_path, method, fields):
    model = tiny.shake(adapted(loaded(checkpoint, method), **fields), std=0.1)
    before = settled(model)
    with into_original():
        merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert not any(map(is_quantised, merged.modules()))
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    model.save_pretrained(tmp_path)
    over_original = veneer.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
    assert_close(logits(merged), logits(over_original), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), before)  # which is left as it was
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_the_original_gets_the_scale_of_now_and_all_that_is_named(checkpoint):
    model = tiny.shake(adapted(loaded(checkpoint, "torchao int8"), modules_to_save=["lm_head"]))
    model.add_adapter("other", config(target_modules=["o_proj"]))
    model.set_adapter("other")
    tiny.shake(model)
    model.set_scale("default", 0.5)
    with into_original():
        merged = model.merge_and_unload(adapter_names=["default", "other"])
    model.set_adapter(["default", "other"])
    assert_close(logits(merged), logits(model), atol=0.05, rtol=0.05)  # but for the base's rounding
    head = model.bare.lm_head.modules_to_save["default"].weight
    assert torch.equal(merged.lm_head.weight, head)
    assert not torch.equal(merged.lm_head.weight, model.bare.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nobody/nothing", "neither a folder nor in the hub's cache"),
        ("", "does not say what it was loaded from"),
        ("SAVED", "is quantised already"),
        ("EMPTY", "has no config.json"),
    ],
)
def test_without_the_original_both_ways_are_named(checkpoint, tmp_path, name, why):
    base = loaded(checkpoint, "torchao int8")
    for folder in ("SAVED", "EMPTY"):
        (tmp_path / folder).mkdir()
    base.save_pretrained(tmp_path / "SAVED")
    base.name_or_path = str(tmp_path / name) if name.isupper() else name
    model = tiny.shake(adapted(base))
    before = logits(model)
    with pytest.raises(MergeError, match=rf"{why}.*Load the base unquantised.*or pass requantize=True"):
        model.merge_and_unload()
    with pytest.raises(MergeError, match=r"q_proj is quantised .*Load the base unquantised.*or pass requantize=True"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)
    assert model.active_adapters == ["default"]


def test_a_plain_torch_model_names_both_ways():
    ao = pytest.importorskip("torchao.quantization")
    base = tiny.Stack()
    ao.quantize_(base, ao.Int8WeightOnlyConfig())
    model = veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["first", "second"]))
    with pytest.raises(MergeError, match="a Stack does not say what it was loaded from.*requantize=True"):
        model.merge_and_unload()
    with rounded_again():
        assert type(model.merge_and_unload(requantize=True)) is tiny.Stack


@BY_METHOD
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_rounded_again_and_taken_out_bit_for_bit(checkpoint, method, fields):
    model = tiny.shake(adapted(loaded(checkpoint, method), **fields), std=0.1)
    before, state, weight = settled(model), weights(model), model.bare.get_submodule(QUERY).weight
    layer = model.bare.get_submodule(QUERY)
    wanted = layer.adapters["default"].merged(read(layer).double(), read(layer).double())
    with rounded_again():
        model.merge_adapter(requantize=True)
    assert is_quantised(layer)
    assert layer.weight is not weight
    assert type(layer.weight) is type(weight)
    error = (read(layer) - wanted).norm() / wanted.norm()
    assert 0 < error < (0.15 if "4" in method else 0.04)
    assert_close(logits(model), before, atol=0.1 if "4" in method else 0.03, rtol=0.1)
    model.unmerge_adapter()
    assert layer.weight is weight
    assert torch.equal(logits(model), before)
    assert all(torch.equal(*pair) for pair in zip(weights(model), state, strict=True))


@BY_METHOD
def test_for_good(checkpoint, tmp_path, method):
    model = tiny.shake(adapted(loaded(checkpoint, method)), std=0.1)
    with rounded_again():
        model.merge_adapter(requantize=True)
    expected = logits(model)
    with rounded_again():  # what was merged so stays so
        merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert torch.equal(logits(merged), expected)
    assert is_quantised(merged.get_submodule(QUERY))
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    if method.startswith("quanto"):
        return  # transformers saves none of these
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert_close(logits(again), expected, atol=0.03 if method == "bnb nf4" else 0, rtol=0)  # which reorders by rounding


def test_what_looks_aside_while_merged_leaves_it_merged(checkpoint):
    """Saving the base, disabling, and merging one more take the weights out and put them in again."""
    model = tiny.shake(adapted(loaded(checkpoint, "torchao int4")), std=0.1)
    model.add_adapter("other", config(target_modules=["o_proj"]))
    with model.disable_adapter():
        base = logits(model)
    with rounded_again():
        model.merge_adapter(requantize=True)
    merged = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    with pytest.raises(MergeError, match="quantised"):
        model.merge_adapter(["other"])
    assert torch.equal(logits(model), merged)
    with rounded_again():
        model.merge_adapter(["other"], requantize=True)
    assert_close(logits(model), merged, atol=0.05, rtol=0.05)  # it starts as nothing
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@BY_METHOD
def test_the_report_before_anything_is_merged(checkpoint, method):
    model = tiny.shake(adapted(loaded(checkpoint, method)), std=0.1)
    before = settled(model)
    report = model.requantization_report(tiny.ids())
    assert torch.equal(logits(model), before)
    assert set(report.layers) == {f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"}
    with rounded_again():
        model.merge_adapter(requantize=True)
    merged = logits(model)
    p, q = before.double().log_softmax(-1), merged.double().log_softmax(-1)
    assert report.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2, abs=1e-7)
    assert report.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert report.tokens == before[..., 0].numel()
    assert 0 < report.relative < (0.15 if "4" in method else 0.04)
    assert report.of_update > report.relative / 10
    total = sum(loss.error for loss in report.layers.values())
    assert report.total.error == pytest.approx(total)
    assert f"same likeliest token   {report.top1:.1%}" in str(report)
    assert f"{report.relative:.2%} of their size" in str(report)


def test_the_report_on_padded_rows_and_other_samples(checkpoint):
    model = tiny.shake(adapted(loaded(checkpoint, "quanto int8")), std=0.1).train()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0
    report = model.requantization_report({"input_ids": tiny.ids(), "attention_mask": mask})
    assert report.tokens == 3 * 7 - 4
    assert model.training
    assert model.requantization_report().kl is None
    for sample in ("a text", {}, {"input_ids": [1, 2]}, 3):
        with pytest.raises(ArgumentError, match="tensor of token ids"):
            model.requantization_report(sample)


def test_an_adapter_of_small_updates_is_reported_to_drown(checkpoint):
    """Where the update is smaller than the steps of the numbers, rounding changes more than the adapter did."""
    model = tiny.shake(adapted(loaded(checkpoint, "bnb nf4")), std=0.002)
    report = model.requantization_report()
    assert report.of_update > 1
    assert report.relative < 0.15


def test_asked_for_where_nothing_is_quantised():
    model = veneer.get_peft_model(tiny.llama(), config())
    for call in (
        lambda: model.merge_adapter(requantize=True),
        lambda: model.merge_and_unload(requantize=True),
        model.requantization_report,
    ):
        with pytest.raises(MergeError, match="nothing to round again: leave requantize out"):
            call()
    assert type(model.merge_and_unload()) is LlamaForCausalLM


def test_positional_arguments_are_pefts(checkpoint):
    model = tiny.shake(adapted(loaded(checkpoint, "torchao int8")))
    with rounded_again():
        model.merge_adapter(["default"], True, requantize=True)
    with pytest.raises(MergeError, match="merged already"):
        model.requantization_report()
    model.unmerge_adapter()
    with into_original():
        model.merge_and_unload(False, True, ["default"])
    with pytest.raises(AdapterNameError, match="typo"):
        model.merge_and_unload(False, True, ["typo"])
    model.unload()
    with pytest.raises(AdapterNameError, match="nothing to merge"):
        model.merge_and_unload(requantize=True)


def test_a_broken_adapter_is_refused_before_anything_changes(checkpoint):
    model = adapted(loaded(checkpoint, "torchao int8"))
    before = logits(model)
    layer = model.bare.get_submodule(QUERY)
    with torch.no_grad():
        layer.adapters["default"].lora_B[0, 0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="would hold NaN"), warnings.catch_warnings():
            merge(requantize=True)
    with torch.no_grad():
        layer.adapters["default"].lora_B[0, 0] = 0
    assert torch.equal(logits(model), before)

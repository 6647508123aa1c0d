"""extract_lora: what it leaves out is what it says, and PEFT reads what it writes."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parity.oracle import read_by_peft
from tiny import Stack, bert, gpt2, ids, llama
from veneer import LoraConfig, PeftModel, extract_lora, get_peft_model
from veneer.errors import ConfigError, TargetError, VeneerWarning
from veneer.model.merge import merge


def tuned(base: nn.Module, *, rank: int | None = None, std: float = 0.05, only: str = "") -> nn.Module:
    """A copy of a model whose weights with two dimensions have moved, by a matrix of this rank or by any."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only not in name or (rank is not None and parameter.dim() != 2):
                continue
            shape = parameter.shape
            noise = torch.randn(shape, generator=generator)
            if rank is not None:
                noise = torch.randn(shape[0], rank, generator=generator) @ torch.randn(
                    rank, shape[1], generator=generator
                )
            parameter.add_(noise.to(parameter.dtype), alpha=std)
    return model


def extracted(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)
        return extract_lora(*args, **kwargs)


def logits(model, x=None) -> torch.Tensor:
    with torch.no_grad():
        y = model(ids() if x is None else x)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.parametrize(("build", "targets"), [(llama, None), (gpt2, ["c_attn", "c_fc"]), (bert, None)])
def test_a_change_of_low_rank_comes_back_whole(build, targets, tmp_path):
    base = build()
    names = targets or ["proj", "query", "key", "value", "dense"]
    full = copy.deepcopy(base)
    for name in names:
        full = tuned(full, rank=3, only=f"{name}.")
    found = extracted(full, base, 3, target_modules=targets)
    assert found.error < 1e-6
    found.save(tmp_path)
    assert not torch.allclose(logits(full), logits(base), atol=1e-2)
    assert torch.allclose(logits(read_by_peft(base, tmp_path)), logits(full), atol=2e-5)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path)), logits(full), atol=2e-5)


def test_embeddings_too(tmp_path):
    base = Stack()
    full = tuned(base, rank=2, only="tokens")
    found = extract_lora(full, base, 2, target_modules=["tokens"])
    found.save(tmp_path)
    assert torch.allclose(logits(read_by_peft(base, tmp_path), ids(20)), logits(full, ids(20)), atol=1e-5)


def test_convolutions_too_but_not_in_groups(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))
    full = copy.deepcopy(base)
    with torch.no_grad():
        full[0].weight += torch.einsum("or,rikl->oikl", torch.randn(6, 2), torch.randn(2, 4, 3, 3))
    found = extract_lora(full, base, 2, target_modules=["0"])
    assert found.error < 1e-6
    found.save(tmp_path)
    x = torch.randn(2, 4, 8, 8)
    assert torch.allclose(logits(read_by_peft(base, tmp_path), x), logits(full, x), atol=1e-5)
    with pytest.raises(ConfigError, match="2: a grouped convolution"):
        extract_lora(full, base, 2, target_modules=["0", "2"])


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.integers(1, 5), st.floats(0.01, 1)), st.integers(0, 2**31), st.floats(1e-4, 10))
def test_the_errors_are_those_of_the_merged_weights(rank, seed, size):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()
    full = copy.deepcopy(base)
    for layer in full:
        layer.weight.data += size * torch.randn_like(layer.weight)
    found = extract_lora(full, base, rank, target_modules=["0", "1"])
    model = copy.deepcopy(base)
    wrapped = get_peft_model(model, found.config.changed(init_lora_weights=False))
    load(wrapped, found.tensors)
    merge(model, ["default"])
    missing = total = 0.0
    for fit in found.layers:
        W, W0 = (m.get_submodule(fit.path)._parameters["weight"] for m in (full, base))
        D, rest = W - W0, W - model.get_submodule(fit.path)._parameters["weight"]
        S = torch.linalg.svdvals(D)
        assert fit.norm == pytest.approx(D.norm().item())
        assert fit.error == pytest.approx((rest.norm() / D.norm()).item(), abs=1e-12)
        assert fit.error == pytest.approx((S[fit.rank :].norm() / S.norm()).item(), abs=1e-12)
        if isinstance(rank, float):
            assert 1 - fit.error**2 >= rank - 1e-9
        missing, total = missing + rest.square().sum().item(), total + D.square().sum().item()
    assert found.error == pytest.approx((missing / total) ** 0.5, abs=1e-12)


def load(model, tensors) -> None:
    from veneer.model.tensors import copy_tensors

    copy_tensors(model.get_base_model(), "default", tensors)


def test_a_share_of_energy_gives_each_layer_its_rank(tmp_path):
    base = llama()
    full = tuned(base, only="proj")
    found = extracted(full, base, 0.8)
    ranks = {fit.rank for fit in found.layers}
    assert len(ranks) > 1
    assert all(fit.error <= 0.2**0.5 for fit in found.layers)
    found.save(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(logits(read_by_peft(base, tmp_path)), logits(ours), atol=1e-6)


def test_with_everything_taken_over_it_is_the_tuned_model(tmp_path):
    base = bert()
    full = tuned(base)
    modules = ["LayerNorm", "word_embeddings", "position_embeddings", "token_type_embeddings", "classifier"]
    found = extract_lora(full, base, 1.0, modules_to_save=modules, bias="all")  # no warning: nothing is left out
    assert found.left_out == {}
    found.save(tmp_path)
    assert torch.allclose(logits(read_by_peft(base, tmp_path)), logits(full), atol=1e-5)
    assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(full), atol=1e-5)


def test_what_is_left_out_is_said():
    base = llama()
    full = tuned(base)
    with pytest.warns(VeneerWarning, match=r"more tensor\(s\) changed .*lm_head.weight.*modules_to_save"):
        found = extract_lora(full, base, 4)
    expected = {name for name in base.state_dict() if "_proj" not in name}
    assert found.left_out.keys() == expected
    change = (full.lm_head.weight - base.lm_head.weight).norm().item()
    assert found.left_out["lm_head.weight"] == pytest.approx(change, rel=1e-5)
    assert "left out" in str(found)
    assert str(found).startswith("LoRA of rank 4 on 14 layers, relative error 0.")


def test_biases_alone_can_be_taken_over():
    base = Stack()
    full = tuned(base)
    found = extracted(full, base, 4, target_modules=["first"], bias="lora_only")
    key = "base_model.model.first.base_layer.bias"
    assert torch.equal(found.tensors[key], full.first.bias)
    assert "first.bias" not in found.left_out
    assert "head.bias" in found.left_out


def test_layers_that_did_not_change_get_no_adapter(tmp_path):
    base = llama()
    found = extract_lora(tuned(base, rank=2, only="layers.1.self_attn.q_proj"), base, 2)
    assert [fit.path for fit in found.layers] == ["model.layers.1.self_attn.q_proj"]
    assert found.config.target_modules == ["1.self_attn.q_proj"]
    assert found.left_out == {}
    found.save(tmp_path)
    adapted = {name for name, _ in read_by_peft(base, tmp_path).named_modules() if name.endswith("lora_A.default")}
    assert adapted == {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.default"}


def test_a_tied_head_that_changed_with_the_embedding_is_left_out():
    base = llama(tied=True)
    with pytest.warns(VeneerWarning, match="lm_head"):
        found = extract_lora(tuned(base, only="embed_tokens"), base, 4, target_modules=["embed_tokens"])
    assert found.left_out.keys() == {"lm_head.weight"}


def test_dtypes_of_half_and_of_choice():
    base, full = llama(dtype=torch.bfloat16), tuned(llama(), std=0.01).to(torch.bfloat16)
    found = extracted(full, base, 4)
    assert {t.dtype for t in found.tensors.values()} == {torch.float32}
    half = extracted(full, base, 4, dtype=torch.bfloat16)
    assert {t.dtype for t in half.tensors.values()} == {torch.bfloat16}
    assert found.error < half.error < found.error + 0.01


def test_neither_model_is_changed():
    base, full = llama(), tuned(llama())
    before = [copy.deepcopy(model.state_dict()) for model in (base, full)]
    extracted(full, base, 4, modules_to_save=["norm"])
    for model, state in zip((base, full), before, strict=True):
        after = model.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], state[name]) for name in state)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_values_are_copies():
    base = bert()
    full = tuned(base)
    found = extracted(full, base, 2, modules_to_save=["classifier"])
    kept = found.tensors["base_model.model.classifier.weight"].clone()
    full.classifier.weight.data.zero_()
    assert torch.equal(found.tensors["base_model.model.classifier.weight"], kept)


def larger(model: nn.Module) -> nn.Module:
    model.resize_token_embeddings(70)
    return model


REFUSED = {
    "the same model": (lambda base: (base, base), {}, ConfigError, "one object"),
    "nothing changed": (lambda base: (copy.deepcopy(base), base), {}, ConfigError, "there is no LoRA"),
    "other shapes": (lambda base: (larger(llama()), base), {}, ConfigError, r"embed_tokens.weight is \[70, 32\]"),
    "other depth": (lambda base: (llama(layers=1), base), {}, ConfigError, "is in base only"),
    "meta": (lambda base: (copy.deepcopy(base).to("meta"), base), {}, ConfigError, "is not loaded"),
    "names": (lambda base: (tuned(base), base), {"target_modules": ["q_porj"]}, TargetError, "did you mean q_proj"),
    "rank": (lambda base: (tuned(base), base), {"rank": 33}, ConfigError, "can have rank 32 at most"),
    "rank 0": (lambda base: (tuned(base), base), {"rank": 0}, ConfigError, "at least 1"),
    "share": (lambda base: (tuned(base), base), {"rank": 1.5}, ConfigError, "at most 1"),
    "nan": (lambda base: (tuned(base, std=float("nan")), base), {}, ConfigError, "q_proj: .*not finite"),
    "bias": (lambda base: (tuned(base), base), {"bias": "all"}, TargetError, "there is no bias to train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    models, fields, error, words = REFUSED[case]
    full, base = models(llama())
    with pytest.raises(error, match=words):
        extract_lora(full, base, **{"rank": 4, **fields})


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_with_adapters_is_refused(which):
    models = [tuned(llama()), llama()]
    models[which] = get_peft_model(models[which], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="has adapters on it"):
        extract_lora(*models, 4)

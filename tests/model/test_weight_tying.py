"""Embedding and output head that are one weight: trained as one, merged as one, or with a warning as two."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.errors import AdapterFileError, AttachError, TargetError, VeneerWarning
from veneer.layers.part import parts_of
from veneer.model.overlay import overlay_needed
from veneer.model.tensors import adapter_tensors
from veneer.targets import preview

X = tiny.ids()
LORA = [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["q_proj", "embed_tokens", "lm_head"], r".*(q_proj|lm_head)"]
SAVED = [["lm_head"], ["embed_tokens"], ["model.embed_tokens", "lm_head"]]
FIELDS = [{"target_modules": names} for names in LORA] + [{"modules_to_save": names} for names in SAVED]
ways = pytest.mark.parametrize("fields", FIELDS, ids=[str(next(iter(fields.values()))) for fields in FIELDS])
tied_llama = functools.partial(tiny.llama, tied=True)


def config(**fields: Any) -> veneer.LoraConfig:
    given = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "ensure_weight_tying": True, "r": 4}
    return veneer.LoraConfig(**{**given, **fields})


def adapted(base: nn.Module | None = None, **fields: Any) -> veneer.PeftModel:
    return tiny.shake(veneer.get_peft_model(tied_llama() if base is None else base, config(**fields)))


def on_embeddings(model: veneer.PeftModel) -> list[str]:
    return [n for n, p in model.bare.named_parameters() if p.requires_grad and ("embed" in n or "head" in n)]


@ways
def test_there_is_one_set_of_parameters(fields):
    model = adapted(**fields)
    if "modules_to_save" in fields:
        assert on_embeddings(model) == ["model.embed_tokens.modules_to_save.default.weight"]
    else:
        assert on_embeddings(model) == [f"model.embed_tokens.adapters.default.lora_{end}" for end in "AB"]
    seen = preview(tied_llama(), config(**fields))
    assert (seen.trainable, seen.total) == model.get_nb_trainable_parameters()


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_acts_is_one_weight_and_stays_one_when_merged(fields, dtype, tmp_path):
    from transformers import LlamaForCausalLM

    model = adapted(tied_llama(dtype=dtype), **fields)
    expected = model(X).logits
    before = model.bare.lm_head.weight
    model.merge_adapter()
    loose = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    assert_close(model(X).logits, expected, **loose)
    if "modules_to_save" not in fields:
        assert model.bare.lm_head.weight is model.bare.model.embed_tokens.weight
        assert not torch.equal(model.bare.lm_head.weight, before)
    model.unmerge_adapter()
    assert model.bare.lm_head.weight is model.bare.model.embed_tokens.weight is before
    assert torch.equal(model(X).logits, expected)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert_close(merged(X).logits, expected, **loose)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("fields", [FIELDS[0], FIELDS[4]])
def test_a_gradient_is_that_of_the_one_weight(fields):
    """By a plain model whose one weight is computed from the same numbers."""
    model = adapted(tied_llama(dtype=torch.float64), **fields)
    model(X).logits.square().mean().backward()
    bare, parameters = model.bare, [p for p in model.bare.parameters() if p.requires_grad and p.grad is not None]
    embedding = bare.model.embed_tokens
    if "modules_to_save" in fields:
        mine = [embedding.modules_to_save["default"].weight]
        same = [mine[0].detach().clone().requires_grad_()]
        W = same[0]
    else:
        adapter = embedding.adapters["default"]
        mine = [adapter.lora_A, adapter.lora_B]
        same = [one.detach().clone().requires_grad_() for one in mine]
        W = embedding.weight.detach() + adapter.scale * (same[1] @ same[0]).T
    plain = copy.deepcopy(model).merge_and_unload()
    weights = {"model.embed_tokens.weight": W, "lm_head.weight": W}
    torch.func.functional_call(plain, weights, (X,), tie_weights=False).logits.square().mean().backward()
    assert len(parameters) == len(mine) + 4
    for found, expected in zip(mine, same, strict=True):
        assert_close(found.grad, expected.grad)


def test_training_keeps_one_value_where_pefts_two_parameters_part():
    """AdamW's steps do not add up as plain gradient descent's do: two parameters over one memory take two each."""
    model = adapted(tied_llama(dtype=torch.bfloat16), target_modules=["q_proj", "lm_head"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(X).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = adapter_tensors(model.bare, "default")
    prefix = "base_model.model."
    embedding_A = tensors[f"{prefix}model.embed_tokens.lora_embedding_A"]
    assert torch.equal(tensors[f"{prefix}lm_head.lora_B.weight"], embedding_A.T)


@ways
def test_files(fields, tmp_path):
    model = adapted(**fields)
    expected = model(X).logits
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", state_dict=model.state_dict())
    for folder in ("a", "b"):
        again = veneer.PeftModel.from_pretrained(tied_llama(), tmp_path / folder, is_trainable=True)
        assert torch.equal(again(X).logits, expected)
        assert on_embeddings(again) == on_embeddings(model)


def test_a_file_whose_halves_differ_is_refused_and_how_to_load_it(tmp_path):
    """PEFT loses the tie over a half-precision base."""
    base = tied_llama(dtype=torch.bfloat16)
    theirs = oracle.made_by_peft(base, r=4, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    oracle.save(tiny.shake(theirs), tmp_path)
    with pytest.raises(AdapterFileError, match="trained apart .* ensure_weight_tying=False"):
        veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    apart = config(target_modules=["q_proj", "lm_head", "embed_tokens"], ensure_weight_tying=False)
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=apart)
    assert_close(ours(X).logits, theirs.eval()(X).logits, atol=0.02, rtol=0.02)


@ways
def test_copies_switches_and_removal(fields):
    model = adapted(**fields)
    expected = model(X).logits
    again = copy.deepcopy(model)
    assert torch.equal(again(X).logits, expected)
    assert on_embeddings(again) == on_embeddings(model)
    with model.disable_adapter():
        assert torch.equal(model(X).logits, tied_llama()(X).logits)
    model.add_adapter("b", config(**fields))
    tiny.shake(model, seed=11)
    model.set_adapter("b")
    tiny.shake(model, seed=12)
    alone = {"b": model(X).logits}
    model.set_adapter("default")
    alone["default"] = model(X).logits
    names = ["b", "default", "b"]
    with overlay_needed(model.bare).route.serving(parts_of(names)):
        mixed = model(X).logits
    for row, name in enumerate(names):
        assert_close(mixed[row], alone[name][row])
    model.delete_adapter("b")
    plain = model.unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(plain(X).logits, tied_llama()(X).logits)


def test_a_second_adapter_on_one_side_unties_the_merge():
    model = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.warns(VeneerWarning, match="only lm_head is trained"):
        model.add_adapter("b", config(target_modules=["lm_head"], ensure_weight_tying=False))
    model.base_model.set_adapter(["default", "b"])
    tiny.shake(model, seed=4)
    expected = model(X).logits
    merged = model.merge_and_unload()
    assert_close(merged(X).logits, expected)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert not merged.config.tie_word_embeddings


class Toy(nn.Module):
    """No config, no get_input_embeddings: a tie is told by the parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.body, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.tokens(ids))))


@pytest.mark.parametrize("fields", [{"target_modules": ["head"]}, {"modules_to_save": ["tokens"]}])
def test_a_plain_module_with_a_bias_on_its_head(fields, tmp_path):
    model = adapted(Toy(), **{"target_modules": ["body"], **fields, "task_type": None, "r": 2})
    if "modules_to_save" in fields:
        assert model.bare.head.modules_to_save["default"].bias.requires_grad
    expected = model(X % 20)
    model.save_pretrained(tmp_path)
    assert torch.equal(veneer.PeftModel.from_pretrained(Toy(), tmp_path)(X % 20), expected)
    merged = model.merge_and_unload()
    assert merged.head.weight is merged.tokens.weight
    assert_close(merged(X % 20), expected)


def test_further_embeddings_over_one_weight():
    """T5's encoder and decoder look up in the embedding they share."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    small = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(small).eval()
    inputs = {"input_ids": X % 40, "decoder_input_ids": X[:, :3] % 40}
    for fields in ({"target_modules": ["q", "shared"]}, {"modules_to_save": ["shared"], "target_modules": ["q"]}):
        model = adapted(copy.deepcopy(base), **fields, task_type="SEQ_2_SEQ_LM")
        expected = model(**inputs).logits
        merged = model.merge_and_unload()
        assert_close(merged(**inputs).logits, expected)
        weights = {id(m.weight) for m in (merged.shared, merged.encoder.embed_tokens, merged.decoder.embed_tokens)}
        assert len(weights) == 1


class TestSettings:
    def test_without_it_one_is_told_what_happens(self):
        for fields, told in (
            ({"target_modules": ["lm_head"]}, "only lm_head is trained"),
            ({"modules_to_save": ["embed_tokens"]}, r"only model\.embed_tokens is trained"),
            ({"modules_to_save": ["embed_tokens", "lm_head"]}, "each is trained by itself"),
        ):
            with pytest.warns(VeneerWarning, match=f"{told}.*ensure_weight_tying=True"):
                adapted(**fields, ensure_weight_tying=False)

    @pytest.mark.parametrize(
        ("tied", "fields", "message"),
        [
            (False, {"target_modules": ["lm_head"]}, "no module shares its weight with an embedding"),
            (True, {}, "name model.embed_tokens or lm_head"),
            (True, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "cannot go with use_dora"),
            (
                True,
                {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
                "share one weight; choose one",
            ),
            (
                True,
                {"target_modules": ["lm_head"], "exclude_modules": ["embed_tokens"]},
                "leaves out model.embed_tokens",
            ),
            (True, {"target_modules": ["lm_head"], "rank_pattern": {"lm_head": 2}}, "but they get one adapter"),
            (True, {"modules_to_save": ["model"], "target_modules": ["lm_head"]}, "choose one"),
            (
                True,
                {"modules_to_save": ["embed_tokens"], "layers_to_transform": [7]},
                "layers_to_transform: no targeted layer has index 7",
            ),
        ],
    )
    def test_what_cannot_be_meant(self, tied, fields, message):
        base = tiny.llama(tied=tied)
        with pytest.raises(TargetError, match=message):
            veneer.get_peft_model(base, config(**fields))
        assert all(p.requires_grad for p in base.parameters())
        assert base.lm_head.weight is base.model.embed_tokens.weight or not tied

    def test_a_file_that_sets_it_to_no_effect_loads_with_a_warning(self, tmp_path):
        """PEFT lets it be set on any model."""
        theirs = oracle.made_by_peft(tied_llama(), r=4, target_modules=["q_proj"], ensure_weight_tying=True)
        oracle.save(tiny.shake(theirs), tmp_path)
        with pytest.warns(VeneerWarning, match="nothing is trained on tied weights"):
            ours = veneer.PeftModel.from_pretrained(tied_llama(), tmp_path)
        assert_close(ours(X).logits, theirs.eval()(X).logits)

    def test_one_way_or_the_other(self):
        model = adapted(target_modules=["lm_head"])
        with pytest.raises(AttachError, match="holds layers that another adapter adapts"):
            model.add_adapter("b", config(modules_to_save=["lm_head"]))
        assert list(model.peft_config) == ["default"]


def test_tied_adapters_are_not_combined():
    model = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(veneer.errors.ConfigError, match="ensure_weight_tying"):
        model.add_weighted_adapter(["default"], [1.0], "c", combination_type="linear")

"""Which modules share a weight, and how a file names them."""

import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
import veneer
from veneer.targets import resolve
from veneer.targets.structure import structure_of
from veneer.targets.ties import Tie, also_named, input_embedding, ties_of


def found(model: nn.Module) -> list[Tie]:
    return ties_of(model, structure_of(model))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def test_ties_are_told_by_the_parameter():
    assert found(tiny.llama(tied=True)) == [Tie("model.embed_tokens", ("lm_head",))]
    assert found(gpt2()) == [Tie("transformer.wte", ("lm_head",))]
    assert found(tiny.llama()) == []
    assert found(tiny.Stack()) == []


def test_layers_that_share_a_weight_without_an_embedding_are_no_tie():
    pair = nn.ModuleDict({"one": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    pair["other"].weight = pair["one"].weight
    assert found(pair) == []


def test_the_input_embedding():
    for model, path in ((tiny.llama(), "model.embed_tokens"), (tiny.Stack(), "tokens")):
        assert input_embedding(model, structure_of(model)) == path
    two = nn.ModuleList([nn.Embedding(2, 2), nn.Embedding(2, 2)])
    assert input_embedding(two, structure_of(two)) is None


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (["q_proj", "lm_head"], ["lm_head", "model.embed_tokens", "q_proj"]),
        (["embed_tokens", "lm_head"], ["embed_tokens", "lm_head"]),
        (r".*(q_proj|lm_head)", r"(?:.*(q_proj|lm_head))|model\.embed_tokens"),
        (r".*(lm_head|embed_tokens)", r".*(lm_head|embed_tokens)"),
    ],
)
def test_a_file_names_every_tied_module(target, named):
    assert also_named(target, ["model.embed_tokens", "lm_head"]) == named


def test_a_tied_site_has_no_parameters_of_its_own():
    resolution = resolve(gpt2(), veneer.LoraConfig(target_modules=["lm_head"], r=2, ensure_weight_tying=True))
    embedding, head = resolution.sites
    assert (embedding.path, head.path, head.tied_to) == ("transformer.wte", "lm_head", "transformer.wte")
    assert (embedding.parameters, head.parameters) == (2 * (20 + 8), 0)
    assert embedding.factors == head.factors
    assert resolution.tied == {"lm_head": "transformer.wte"}


def test_a_tied_weight_inside_a_larger_saved_module_is_refused():
    with pytest.raises(veneer.errors.TargetError, match="is part of a larger module in modules_to_save"):
        resolve(
            tiny.llama(tied=True),
            veneer.LoraConfig(target_modules=["q_proj"], modules_to_save=["model"], ensure_weight_tying=True),
        )

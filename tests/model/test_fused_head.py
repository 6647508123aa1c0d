"""A loss that multiplies by the weight of the output head itself, as TRL's do, trains what a call of the head would."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tiny
import veneer
from veneer.errors import AttachError
from veneer.integrations.transformers import add_adapter
from veneer.model.batch import serving
from veneer.model.fused_head import readable_head

X = tiny.ids()


def logits(model: Any, *, fused: bool = False, **kwargs: Any) -> torch.Tensor:
    """The logits; with `fused` in TRL's manner, without a call of the head."""
    bare = model.get_base_model() if isinstance(model, veneer.PeftModel) else model
    if not fused:
        return model(X, **kwargs).logits
    with readable_head(bare, {"fused_lm_head": True}):
        head = bare.get_output_embeddings()
        return F.linear(bare.base_model(X).last_hidden_state, head.weight, head.bias)


def facade(*, tied: bool = False, **fields) -> Any:
    return veneer.get_peft_model(tiny.llama(tied=tied), config(**fields))


def in_place(*, tied: bool = False, **fields) -> Any:
    model = tiny.llama(tied=tied)
    add_adapter(model, config(**fields))
    return model


def config(**fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **fields})


def gradients(model: Any, **kwargs: Any) -> list[torch.Tensor]:
    model.zero_grad()
    found = logits(model, **kwargs)
    found.logsumexp(-1).sum().backward()
    return [found.detach(), *(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)]


def shift(model: Any) -> None:
    """Move everything trained away from the base."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


CASES = {
    "copy": {"modules_to_save": ["lm_head"]},
    "rows of a tied head": {"tied": True, "trainable_token_indices": [3, 9]},
    "nothing on the head": {},
}


@pytest.mark.parametrize("door", [facade, in_place])
@pytest.mark.parametrize("case", list(CASES))
def test_it_reads_the_weight_that_acts(door, case):
    model = door(**CASES[case])
    shift(model)
    called, read = gradients(model), gradients(model, fused=True)
    assert len(called) == len(read) > 1
    for one, other in zip(called, read, strict=True):
        assert_close(one, other)
    assert "get_output_embeddings" not in vars(model)


@pytest.mark.filterwarnings("ignore:lm_head is trained in full:veneer.errors.VeneerWarning")
def test_of_several_copies_it_reads_the_one_that_acts():
    model = facade(modules_to_save=["lm_head"])
    model.add_adapter("other", config(modules_to_save=["lm_head"]))
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        shift(model)
        assert_close(logits(model, fused=True), logits(model))


def test_rows_of_a_head_leave_its_bias():
    model = tiny.llama(tied=True)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    add_adapter(model, config(trainable_token_indices=[3, 9]))
    shift(model)
    assert_close(logits(model, fused=True), logits(model))


def test_without_adapters_it_reads_the_base():
    model = facade(modules_to_save=["lm_head"])
    shift(model)
    with model.disable_adapter():
        assert_close(logits(model, fused=True), logits(model))


def test_lora_on_the_head_is_refused():
    model = facade(target_modules=["q_proj", "lm_head"])
    with pytest.raises(AttachError, match="TRL multiplies by lm_head.weight itself"):
        logits(model, fused=True)


def test_lora_on_the_head_is_welcome_where_the_head_is_called():
    model = facade(target_modules=["q_proj", "lm_head"]).get_base_model()
    with readable_head(model, {"fused_lm_head": False}), readable_head(model, {}):
        assert model.get_output_embeddings() is model.lm_head


def test_rows_with_adapters_of_their_own_are_refused():
    model = facade(modules_to_save=["lm_head"]).eval()
    model.add_adapter("b", config(modules_to_save=["lm_head"]))
    names = ["default", *["b"] * (len(X) - 1)]
    with (
        serving(model.get_base_model(), (X,), {}, adapter_names=names),
        pytest.raises(AttachError, match="cannot serve some of its rows"),
    ):
        logits(model, fused=True)

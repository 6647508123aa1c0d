"""What is gathered together, and in which order: known from a model's structure, without a second process."""

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer.distributed import all_ranks
from veneer.distributed.blocks import groups_of
from veneer.errors import AttachError, RankError
from veneer.layers.sharded import is_sharded, rows_here, whole
from veneer.model.ranks import is_first


def adapted(model: nn.Module, **fields) -> nn.Module:
    veneer.inject_adapter_in_model(veneer.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}), model)
    return model


def paths(model: nn.Module) -> list[str]:
    return [group.path for group in groups_of(model)]


def test_blocks_of_transformers_come_before_the_model():
    assert paths(adapted(tiny.llama(layers=3))) == ["model.layers.2", "model.layers.1", "model.layers.0", ""]


def test_in_other_models_what_a_list_repeats_is_a_block():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
    assert paths(adapted(model, target_modules=["0"])) == ["1", "0", ""]
    assert paths(adapted(tiny.Stack(), target_modules=["first"])) == [""]


def test_a_block_that_shares_a_weight_stays_with_the_rest():
    model = tiny.llama(layers=3)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    assert paths(adapted(model)) == ["model.layers.0", ""]


def test_copies_of_another_dtype_are_a_group_of_their_own():
    model = adapted(tiny.llama(dtype=torch.bfloat16), modules_to_save=["lm_head", "input_layernorm"])
    norms = [f"model.layers.{n}.input_layernorm.modules_to_save.default" for n in (1, 0)]
    # the head's copy is all that trains outside of blocks, so it goes with the rest
    assert paths(model) == [norms[0], "model.layers.1", norms[1], "model.layers.0", ""]
    assert paths(adapted(tiny.llama(), modules_to_save=["lm_head"])) == ["model.layers.1", "model.layers.0", ""]


def test_dtypes_that_fsdp_cannot_reduce_together_are_an_error():
    model = adapted(tiny.llama(dtype=torch.bfloat16))
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    with pytest.raises(AttachError, match=r"model.layers.1 has several dtypes(.|\n)*bfloat16: input_layernorm.weight"):
        groups_of(model)


def test_sharding_needs_a_process_group():
    with pytest.raises(AttachError, match="torchrun"):
        veneer.shard(adapted(tiny.llama()))


def test_one_process_has_nothing_to_agree_upon():
    with all_ranks("counting"):
        pass
    with pytest.raises(KeyError), all_ranks("counting"):
        raise KeyError("its own error")
    assert is_first()
    assert issubclass(RankError, RuntimeError)


def test_a_plain_tensor_is_whole():
    plain = torch.ones(5, 2, requires_grad=True)
    assert not is_sharded(plain)
    assert rows_here(plain) == slice(0, 5)
    assert not whole(plain).requires_grad

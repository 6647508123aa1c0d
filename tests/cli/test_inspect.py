"""What `veneer inspect` says of each kind of adapter is what the file holds."""

from pathlib import Path

import pytest
import torch

import tiny_moe
from train.tiny_chat import model as chat
from veneer import LoraConfig, get_peft_model
from veneer.model.contents import contents_of
from veneer.storage.adapter_file import read_config, read_weights_header


def contents(model: torch.nn.Module, folder: Path, **fields):
    """What inspect sees in the file of a new adapter, and how many numbers that adapter trains."""
    made = get_peft_model(model, LoraConfig(r=4, **{"lora_alpha": 8, **fields}))
    made.save_pretrained(folder)
    return contents_of(read_weights_header(folder).tensors, read_config(folder)), made.get_nb_trainable_parameters()[0]


def test_patterns_set_ranks_and_scales(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "k_proj", "v_proj"], "rank_pattern": {"k_proj": 2}}
    found, trained = contents(chat(), tmp_path, alpha_pattern={"v_proj": 32}, **fields)
    assert {name: (group.ranks, group.scales) for name, group in found.groups.items()} == {
        "q_proj": ({4}, {2.0}),
        "k_proj": ({2}, {4.0}),
        "v_proj": ({4}, {8.0}),
    }
    assert found.parameters == trained


def test_experts_have_a_rank_each(tmp_path: Path) -> None:
    found, trained = contents(
        tiny_moe.mixtral(), tmp_path, target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    experts = found.groups["experts.down_proj"]
    assert (experts.ranks, experts.matrices, experts.scales) == ({4}, {4}, {2.0})
    assert (experts.outs, experts.ins) == ({16}, {24})
    assert found.groups["q_proj"].matrices == {1}
    assert found.parameters == trained


@pytest.mark.parametrize(
    "fields",
    [{"trainable_token_indices": [3, 5]}, {"lora_bias": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}],
    ids=lambda fields: next(iter(fields)),
)
def test_every_number_that_trains_is_counted_once(fields: dict, tmp_path: Path) -> None:
    found, trained = contents(chat(), tmp_path, target_modules=["q_proj"], **fields)
    assert found.parameters == trained
    assert found.rows == ({"model.embed_tokens (2 rows)": (1, 64)} if "trainable_token_indices" in fields else {})


def test_kernels_count_as_inputs(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 8))
    found, trained = contents(model, tmp_path, target_modules=["0"])
    assert (found.groups["0"].outs, found.groups["0"].ins) == ({16}, {3 * 8 * 8})
    assert found.parameters == trained

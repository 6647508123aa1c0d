"""Fused experts are no linear layers: "all-linear" leaves them out, and says so."""

import warnings

import pytest
from torch import nn

import tiny_moe
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import TargetError, VeneerWarning
from veneer.targets import preview

NAMES = "target_parameters=['experts.gate_up_proj', 'experts.down_proj']"


@pytest.mark.parametrize("choice", [None, "all-linear"])
def test_all_linear_names_the_experts_it_leaves_out_and_their_share(choice: str | None) -> None:
    model = tiny_moe.mixtral()
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    share = f"leaves {100 * experts / model.num_parameters():.0f} % of the weights of MixtralForCausalLM"
    with pytest.warns(VeneerWarning) as caught:
        found = preview(model, LoraConfig(target_modules=choice))
    (said,) = [str(warning.message) for warning in caught]
    assert share in said
    assert NAMES in said
    assert found.stacks == {"experts.gate_up_proj": 2, "experts.down_proj": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "target_parameters": tiny_moe.BOTH},
        {"target_modules": "all-linear", "exclude_modules": ["experts"]},
        {"target_modules": ["q_proj"]},
    ],
)
def test_who_names_them_is_not_told(fields: dict) -> None:
    preview(tiny_moe.mixtral(), LoraConfig(r=2, **fields))  # warnings are errors in tests


def test_a_loaded_adapter_warns_of_nothing(tmp_path) -> None:
    with pytest.warns(VeneerWarning, match="all-linear"):
        get_peft_model(tiny_moe.mixtral(), LoraConfig(r=2)).save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        PeftModel.from_pretrained(tiny_moe.mixtral(), tmp_path)


def test_stacks_that_are_no_experts_are_not_told() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.inner = nn.Module()
            self.inner.position_embeddings = nn.Parameter(nn.Linear(4, 50).weight.detach()[None].clone())

    assert preview(Positions(), LoraConfig(r=2)).stacks == {}


def test_the_module_of_experts_is_told_its_parameters() -> None:
    with pytest.raises(TargetError, match=r"name its parameters: mlp.experts.gate_up_proj, mlp.experts.down_proj"):
        preview(tiny_moe.mixtral(), LoraConfig(target_parameters=["mlp.experts"]))

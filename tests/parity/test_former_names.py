"""Adapters that PEFT made over the modules of transformers 4, on the models of today.

Judged by the weights that PEFT merges over the modules of that time. Where PEFT itself reads such a file in another
way, its outcome is noted: a number that it is off by at least, or what its error says.
"""

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import former_models
import tiny
import tiny_moe
import veneer
from former_models import LLAVA, MIXTRAL, QWEN, QWEN_VL
from parity import oracle
from veneer.errors import VeneerWarning

FAMILIES: dict[str, tuple[Any, Any]] = {
    "mixtral": (tiny_moe.mixtral, MIXTRAL),
    "qwen2": (tiny_moe.qwen2_moe, QWEN),
    "qwen3": (tiny_moe.qwen3_moe, QWEN),
    "deepseek": (former_models.deepseek, QWEN),
    "llava": (former_models.llava, LLAVA),
    "qwen-vl": (former_models.qwen_vl, QWEN_VL),
}
EQUAL = 0.0
EXPERTS = ["w1", "w2", "w3"]
ALL = ["gate_proj", "up_proj", "down_proj"]
VISION = r"language_model\.model\.layers\.\d+\.self_attn\.(q|v)_proj"
SOME = {"w3": 5, "0.w2": 1}
ONE = {"layers.1.block_sparse_moe.experts.2.w2": 3}
# family, name, fields, what PEFT makes of it
CASES: list[tuple[str, str, dict[str, Any], float | str]] = [
    ("mixtral", "all", {"target_modules": ["q_proj", *EXPERTS]}, EQUAL),
    ("mixtral", "rslora", {"target_modules": [*EXPERTS, "gate"], "use_rslora": True}, 1e-2),
    ("mixtral", "half", {"target_modules": ["w1"]}, "without also targeting w3"),
    ("mixtral", "patterns", {"target_modules": EXPERTS, "rank_pattern": SOME, "alpha_pattern": ONE}, "equal size"),
    ("mixtral", "alpha", {"target_modules": EXPERTS, "alpha_pattern": {"w2": 3}}, 1e-2),
    ("mixtral", "some-experts", {"target_modules": r".*experts\.[02]\.w[123]"}, "not found in the base model"),
    ("mixtral", "one-layer", {"target_modules": [*EXPERTS, "v_proj"], "layers_to_transform": [1]}, EQUAL),
    ("mixtral", "dora", {"target_modules": EXPERTS, "use_dora": True}, "does not work with use_dora"),
    ("mixtral", "dropout", {"target_modules": EXPERTS, "lora_dropout": 0.1}, "does not work with lora_dropout"),
    ("mixtral", "saved", {"target_modules": ["w2"], "modules_to_save": ["lm_head"]}, EQUAL),
    ("qwen2", "all", {"target_modules": ALL}, 1e-2),
    ("qwen2", "router", {"target_modules": ["q_proj", "mlp.gate"]}, "is not supported"),
    (
        "qwen2",
        "excluded",
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["shared_expert.down_proj"]},
        1e-3,
    ),
    ("qwen3", "all", {"target_modules": [*ALL, "gate"]}, EQUAL),
    ("qwen3", "up", {"target_modules": ["up_proj", "o_proj"]}, "without also targeting gate_proj"),
    ("deepseek", "all", {"target_modules": ["q_b_proj", *ALL]}, 1e-2),
    ("llava", "names", {"target_modules": ["q_proj"]}, EQUAL),
    ("llava", "regex", {"target_modules": VISION, "modules_to_save": ["language_model.lm_head"]}, "not found in the"),
    ("llava", "paths", {"target_modules": ["language_model.model.layers.0.mlp.up_proj", "linear_1"]}, 1e-3),
    (
        "llava",
        "tokens",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
        "KeyError",
    ),
    ("qwen-vl", "regex", {"target_modules": r"^model\.layers.*down_proj$"}, "not found in the base model"),
    ("qwen-vl", "saved", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "KeyError"),
]
case = pytest.mark.parametrize(
    ("family", "fields", "in_peft"),
    [pytest.param(f, fields, peft, id=f"{f}-{name}") for f, name, fields, peft in CASES],
)
# What these models have under a name that PEFT takes for the experts' alone, also in a file that has today's names.
PEFT_LOSES = ("deepseek",)


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


def made_by_peft(family: str, fields: dict[str, Any], folder: Any) -> tuple[Any, Any]:
    """(the model of today, the same with the adapter that the folder gets merged into it)."""
    make, names = FAMILIES[family]
    base = former_models.exact(make())
    theirs = tiny.shake(oracle.made_by_peft(former_models.tree(names.before(base)), r=2, lora_alpha=6, **fields))
    oracle.save(theirs, folder)
    merged = former_models.weights_of(oracle.quietly(theirs.merge_and_unload))
    expected = copy.deepcopy(base)
    expected.load_state_dict(names.today(base, merged))
    return base, expected


@case
def test_the_adapter_is_what_it_was(family, fields, in_peft, tmp_path):
    base, expected = made_by_peft(family, fields, tmp_path / "theirs")
    wanted = run(expected)
    assert not torch.allclose(wanted, run(base), atol=1e-3), "the adapter does nothing: a void test"
    with pytest.warns(VeneerWarning, match=f"made for an older version of {type(base).__name__}"):
        ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", autocast_adapter_dtype=False)
    assert_close(run(ours), wanted)

    ours.save_pretrained(tmp_path / "again")
    again = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert torch.equal(run(again), run(ours))
    if not fields.get("use_dora") and family not in PEFT_LOSES:
        assert_close(run(oracle.read_by_peft(base, tmp_path / "again").eval()), wanted)

    merged = ours.merge_and_unload().state_dict()
    for name, value in expected.state_dict().items():
        assert_close(merged[name], value, msg=lambda text, name=name: f"{name}: {text}")


@case
def test_what_peft_makes_of_it(family, fields, in_peft, tmp_path):
    """So that it is noticed when PEFT changes: then the table above, and what our pages say of it, is out of date."""
    base, expected = made_by_peft(family, fields, tmp_path)
    if isinstance(in_peft, str):
        with pytest.raises((ValueError, KeyError, RuntimeError)) as raised:
            oracle.read_by_peft(base, tmp_path)
        assert in_peft in f"{type(raised.value).__name__}: {raised.value}"
        return
    off = (run(oracle.read_by_peft(base, tmp_path).eval()) - run(expected)).abs().max()
    assert off < 1e-6 if in_peft == EQUAL else off > in_peft

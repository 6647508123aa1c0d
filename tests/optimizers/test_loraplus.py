"""LoRA+: PEFT's groups and PEFT's steps."""

import math

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as pefts

import tiny
import veneer
from optimizers.steps import assert_same_adapter, made_alike, run
from veneer import create_loraplus_optimizer
from veneer.errors import AdapterNameError, ConfigError, VeneerWarning

LLAMA = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}
STACK = {"target_modules": ["first", "second", "tokens"], "modules_to_save": ["head"], "bias": "all"}
CASES = [
    pytest.param(tiny.llama, LLAMA, id="llama"),
    pytest.param(tiny.llama, {**LLAMA, "use_dora": True}, id="dora"),
    pytest.param(tiny.llama, {**LLAMA, "use_rslora": True, "rank_pattern": {"q_proj": 2}}, id="patterns"),
    pytest.param(tiny.Stack, STACK, id="biases-and-saved"),
    pytest.param(tiny.Stack, {"target_modules": ["first", "second"], "lora_bias": True}, id="bias-of-its-own"),
]


def test_it_can_be_reached_by_pefts_path():
    import veneer.optimizers

    assert veneer.optimizers.create_loraplus_optimizer is veneer.create_loraplus_optimizer


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(("base", "fields"), CASES)
def test_the_steps_are_pefts(base, fields, cls, tmp_path):
    theirs, ours = made_alike(base(), tmp_path, **fields)
    said = {"lr": 0.01, "loraplus_lr_ratio": 4, "loraplus_lr_embedding": 0.05, "loraplus_weight_decay": 0.1}
    made = [make(model, cls, **said) for make, model in ((pefts, theirs), (create_loraplus_optimizer, ours))]
    assert [len(group["params"]) for group in made[0].param_groups] == [len(g["params"]) for g in made[1].param_groups]
    before = run(theirs, made[0], 5), run(ours, made[1], 5)
    torch.testing.assert_close(before[1], before[0], rtol=1e-5, atol=1e-6)
    assert_same_adapter(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_in_which_group():
    config = veneer.LoraConfig(
        target_modules=["first", "second", "tokens"], modules_to_save=["head", "norm"], bias="lora_only", use_dora=True
    )
    model = veneer.get_peft_model(tiny.Stack(), config)
    made = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, betas=(0.8, 0.9)
    )
    names = {id(p): name.removeprefix("base_model.model.") for name, p in model.named_parameters()}
    found = [
        (group["lr"], group["weight_decay"], {names[id(p)] for p in group["params"]}) for group in made.param_groups
    ]
    assert found == [
        (
            1e-3,
            0.1,
            {
                "first.adapters.default.lora_A",
                "second.adapters.default.lora_A",
                "head.modules_to_save.default.weight",
            },
        ),
        (1e-6, 0.1, {"tokens.adapters.default.lora_A", "tokens.adapters.default.lora_B"}),
        (
            0.016,
            0.1,
            {
                "first.adapters.default.lora_B",
                "second.adapters.default.lora_B",
                "first.adapters.default.lora_magnitude_vector",
                "second.adapters.default.lora_magnitude_vector",
                "tokens.adapters.default.lora_magnitude_vector",
            },
        ),
        (
            0.016,
            0.0,
            {
                "first.bias",
                "head.modules_to_save.default.bias",
                "norm.modules_to_save.default.weight",
                "norm.modules_to_save.default.bias",
            },
        ),
    ]
    assert all(group["betas"] == (0.8, 0.9) for group in made.param_groups)


def test_an_adapter_that_rests_is_left_out():
    model = veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"]))
    model.add_adapter("other", veneer.LoraConfig(target_modules=["first", "second"]))
    made = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2)
    assert [len(group["params"]) for group in made.param_groups] == [1, 0, 1, 0]


def test_a_model_adapted_in_place_has_the_same_groups():
    from veneer.integrations.transformers import add_adapter

    bare = tiny.llama()
    add_adapter(bare, veneer.LoraConfig(**LLAMA))
    made = create_loraplus_optimizer(bare, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=2)
    assert [len(group["params"]) for group in made.param_groups] == [4, 2, 4, 0]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "fast", None, True])
@pytest.mark.parametrize("key", ["lr", "loraplus_lr_ratio", "loraplus_lr_embedding", "loraplus_weight_decay"])
def test_a_number_that_cannot_be_right_is_an_error(key, bad):
    model = veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"]))
    said = {"lr": 0.1, "loraplus_lr_ratio": 2, key: bad}
    with pytest.raises(ConfigError, match=rf"\n  {key} should be a finite number .* 0, got {bad!r}$"):
        create_loraplus_optimizer(model, torch.optim.AdamW, **said)


def test_all_wrong_numbers_come_at_once():
    with pytest.raises(ConfigError) as caught:
        create_loraplus_optimizer(tiny.Stack(), torch.optim.AdamW, lr=math.nan, loraplus_lr_ratio=0)
    assert "lr should be a finite number of at least 0, got nan" in str(caught.value)
    assert "loraplus_lr_ratio should be a finite number above 0, got 0" in str(caught.value)


def test_what_has_no_effect_or_the_wrong_one_is_said():
    model = veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"]))
    with pytest.raises(ConfigError, match="weight_decay would have no effect.*Say loraplus_weight_decay"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=2, weight_decay=0.1)
    with pytest.warns(VeneerWarning, match=r"loraplus_lr_ratio=0\.5 lets B learn slower than A"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=0.5)


def test_a_model_without_an_adapter_that_trains_is_an_error():
    with pytest.raises(AdapterNameError, match="no adapter to optimize. Lay one over it first"):
        create_loraplus_optimizer(tiny.Stack(), torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=2)
    model = veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"]))
    model.set_requires_grad("default", False)
    with pytest.raises(AdapterNameError, match=r"No adapter of the model trains \('default'\)"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=2)


def test_bitsandbytes_keeps_an_embedding_in_32_bits():
    """Run where bitsandbytes is installed: its 8-bit state is for the factors, not for an embedding trained in full."""
    optim = pytest.importorskip("bitsandbytes").optim
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "r": 8, "task_type": "CAUSAL_LM"}
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**fields))
    made = create_loraplus_optimizer(model, optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=16)
    overrides = optim.GlobalOptimManager.get_instance().module_weight_config_triple
    assert [(type(module), name, said) for module, name, said in overrides[-1:]] == [
        (torch.nn.Embedding, "weight", {"optim_bits": 32})
    ]
    losses = run(model, made, 4)
    assert losses[-1] < losses[0]

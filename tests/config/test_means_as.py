"""Whether two configs say the same of a model's layers."""

import pytest

import veneer

FIELDS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, "0.q_proj": 3}}


def config(**fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{**FIELDS, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["v_proj", "q_proj"]},
        {"inference_mode": True},
        {"base_model_name_or_path": "another", "revision": "main"},
    ],
)
def test_what_no_layer_knows_of_and_the_order_of_targets_are_the_same(fields):
    assert config(**fields).means_as(config().in_use())


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 8},
        {"lora_alpha": 3},
        {"target_modules": ["q_proj"]},
        {"target_modules": "q_proj"},
        {"rank_pattern": {"0.q_proj": 3, "q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"task_type": "SEQ_CLS"},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
    ],
)
def test_every_other_field_and_the_order_of_a_pattern_count(fields):
    assert not config(**fields).means_as(config().in_use())


def test_what_was_changed_since_does_not_count():
    used = config().in_use()
    used.task_type = "SEQ_CLS"
    assert config().means_as(used)
    assert not config(task_type="SEQ_CLS").means_as(used)


def test_a_config_that_no_adapter_was_made_with_is_like_none():
    assert not config().means_as(config())

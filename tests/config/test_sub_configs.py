import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import warnings

import peft
import pytest
from peft.tuners.lora import config as peft_config

from veneer.config.sub_configs import (
    SUB_CONFIGS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
)
from veneer.errors import ConfigError, UnknownFieldError

CLASSES = list(SUB_CONFIGS.values())
OTHERS = {
    "corda_config": {"cache_file": "a.safetensors", "corda_method": "kpm", "verbose": True},
    "eva_config": {"rho": 1.5, "tau": 0.5, "whiten": True, "label_mask_value": -1},
    "loftq_config": {"loftq_bits": 8, "loftq_iter": 3},
    "lora_ga_config": {"direction": "random", "scale": "unit", "stable_gamma": 4},
}


@pytest.mark.parametrize("cls", CLASSES)
def test_fields_and_defaults_are_peft_s(cls):
    theirs = getattr(peft_config, cls.__name__)
    assert [f.name for f in dataclasses.fields(cls)] == [f.name for f in dataclasses.fields(theirs)]
    assert cls().to_dict() == dataclasses.asdict(theirs())


@pytest.mark.parametrize("given", [{}, "others"])
@pytest.mark.parametrize("name", OTHERS)
def test_json_is_what_peft_writes(name, given, tmp_path):
    given = OTHERS[name] if given else {}
    ours, theirs = SUB_CONFIGS[name](**given), getattr(peft_config, SUB_CONFIGS[name].__name__)(**given)
    init = name.removesuffix("_config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.LoraConfig(init_lora_weights=init, target_modules=["x"], **{name: theirs}).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert written[name] == ours.to_dict()
        assert SUB_CONFIGS[name].from_dict(written[name]) == ours
        read = peft.LoraConfig(init_lora_weights=init, target_modules=["x"], **{name: ours.to_dict()})
    assert read.to_dict()[name] == ours.to_dict()


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (EvaConfig, {"rho": 0.99}),
        (EvaConfig, {"rho": float("nan")}),
        (EvaConfig, {"rho": float("inf")}),
        (EvaConfig, {"rho": True}),
        (EvaConfig, {"rho": "2"}),
        (EvaConfig, {"tau": -0.1}),
        (EvaConfig, {"tau": 1.1}),
        (EvaConfig, {"tau": float("nan")}),
        (EvaConfig, {"whiten": "false"}),
        (EvaConfig, {"use_label_mask": 1}),
        (EvaConfig, {"label_mask_value": 1.5}),
        (EvaConfig, {"label_mask_value": True}),
        (EvaConfig, {"adjust_scaling_factors": None}),
        (CordaConfig, {"corda_method": "imp"}),
        (CordaConfig, {"corda_method": None}),
        (CordaConfig, {"cache_file": ""}),
        (CordaConfig, {"covariance_file": 3}),
        (CordaConfig, {"verbose": 0}),
        (CordaConfig, {"use_float16_for_covariance": "no"}),
        (CordaConfig, {"prune_temporary_fields": []}),
        (LoftQConfig, {"loftq_bits": 3}),
        (LoftQConfig, {"loftq_bits": 4.0}),
        (LoftQConfig, {"loftq_bits": True}),
        (LoftQConfig, {"loftq_iter": 0}),
        (LoftQConfig, {"loftq_iter": 1.5}),
        (LoraGAConfig, {"direction": "arbr"}),
        (LoraGAConfig, {"scale": None}),
        (LoraGAConfig, {"scale": ["unit"]}),
        (LoraGAConfig, {"stable_gamma": 0}),
        (LoraGAConfig, {"stable_gamma": float("inf")}),
        (LoraRuntimeConfig, {"ephemeral_gpu_offload": "yes"}),
    ],
)
def test_values_that_cannot_be_right(cls, fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        cls(**fields)
    with pytest.raises(ConfigError):
        dataclasses.replace(cls(), **fields)


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError, match=r"(?s)EvaConfig.*rho=0.*tau=2.*whiten=None"):
        EvaConfig(rho=0, tau=2, whiten=None)


def test_every_field_has_a_rule():
    for cls in CLASSES:
        assert list(cls.rules) == [f.name for f in dataclasses.fields(cls)]


@pytest.mark.parametrize("make", [lambda **given: EvaConfig(**given), lambda **given: EvaConfig.from_dict(given)])
def test_unknown_names_are_refused_with_the_one_meant(make):
    with pytest.raises(UnknownFieldError, match=r"(?s)rhoo: no such field, did you mean 'rho'.*nonsense: no such"):
        make(rhoo=2, nonsense=1)
    with pytest.raises(TypeError):
        make(rhoo=2)


def test_of():
    one = LoftQConfig(loftq_bits=2)
    assert LoftQConfig.of(one) is one
    assert LoftQConfig.of({"loftq_bits": 2}) == one
    assert LoftQConfig.of(None) == LoftQConfig.of({}) == LoftQConfig()
    for wrong in (EvaConfig(), 4, "4", [4]):
        with pytest.raises(ConfigError, match="LoftQConfig"):
            LoftQConfig.of(wrong)


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_are_equal_and_nothing_can_be_changed(cls):
    one = cls()
    assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == cls.from_dict(one.to_dict()) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, dataclasses.fields(cls)[0].name, None)


def test_no_torch_is_needed():
    code = "import sys, veneer.config.sub_configs, veneer.config.init_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

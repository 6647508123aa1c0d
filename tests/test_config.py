import copy
import dataclasses
import inspect
import json
import math
import pickle
import warnings

import peft
import pytest

from veneer.config import LoraConfig, TaskType, matches, matches_end, rank_and_alpha
from veneer.config.rules import MAX_RANK
from veneer.errors import AdapterFileError, ConfigError, UnknownFieldError

NAN, INF = math.nan, math.inf

GOOD = {
    "task_type": [None, "CAUSAL_LM", TaskType.SEQ_CLS, "FEATURE_EXTRACTION"],
    "base_model_name_or_path": [None, "", "org/model", "/a/path"],
    "revision": [None, "main"],
    "inference_mode": [True, False],
    "r": [1, 8, MAX_RANK],
    "target_modules": [None, ["q_proj"], ["a.b", "c"], r".*\.q_proj", "all-linear", "All-Linear"],
    "exclude_modules": [None, [], ["q_proj"], ".*head"],
    "lora_alpha": [1, 0.5, 16.0, 10**30],
    "lora_dropout": [0, 0.0, 0.999],
    "fan_in_fan_out": [True, False],
    "bias": ["none", "all", "lora_only"],
    "use_rslora": [True, False],
    "modules_to_save": [None, [], ["lm_head"], "lm_head"],
    "init_lora_weights": [True, False, "gaussian", "pissa", "pissa_niter_16", "eva"],
    "layers_to_transform": [None, 0, [0, 3], []],
    "rank_pattern": [{}, {"q_proj": 4}, {r"layers\.[01]\..*": 1}, None],
    "alpha_pattern": [{}, {"q_proj": 0.5}, None],
    "use_dora": [True, False],
    "lora_bias": [True, False],
    "target_parameters": [None, [], ["mlp.experts.gate_up_proj"]],
    "trainable_token_indices": [None, [], {}, [0, 7], {"embed_tokens": [3]}],
    "layer_replication": [None, [], [(0, 2), (1, 3)], [[0, 4]]],
    "ensure_weight_tying": [True, False],
    "alora_invocation_tokens": [None, [1, 2, 1]],
    "loftq_config": [None, {}],
    "eva_config": [None, {}],
    "corda_config": [None],
    "lora_ga_config": [None],
    "runtime_config": [None, {}, {"ephemeral_gpu_offload": False}],
}

BAD = {
    "task_type": ["CAUSAL-LM", "causal_lm", 1, True, ["CAUSAL_LM"]],
    "base_model_name_or_path": [1, b"model", ["model"]],
    "revision": ["", " ", 1],
    "inference_mode": [None, 0, "false"],
    "r": [0, -4, 8.0, 8.5, "8", True, None, NAN, 10**8, 10**400, [8]],
    "target_modules": [
        [],
        "",
        " ",
        [""],
        [None],
        [1],
        ["q", "q"],
        "(q_proj",
        "a" * 2000,
        "(" * 400 + ")" * 400,
        {},
        1,
        b"q",
    ],
    "exclude_modules": ["", [""], [None], "(q", {"a": 1}, 0],
    "lora_alpha": [0, -16, NAN, INF, -INF, "16", None, True, 10**400, [16]],
    "lora_dropout": [1, 1.0, 1.5, -0.1, NAN, INF, "0.1", None, True],
    "fan_in_fan_out": [None, 1, "true"],
    "bias": ["lora-only", "foo_only", None, True, ""],
    "use_rslora": ["false", 0, None],
    "modules_to_save": [[""], [1], ["a", "a"], {"a": 1}, 5],
    "init_lora_weights": ["gausian", "pissa_niter_0", "pissa_niter", 1, None, ""],
    "layers_to_transform": [-1, [-1], "0", True, [True], [0, "1"], 1.0],
    "layers_pattern": ["(layers", "", [""], [1], ["(h"]],
    "rank_pattern": [{"q": 0}, {"q": 4.0}, {"q": "4"}, {"(q": 4}, {1: 4}, {"": 4}, ["q"], {"q": 10**9}],
    "alpha_pattern": [{"q": "64"}, {"q": 0}, {"q": NAN}, {"q": INF}, {"q": None}, {"(q": 1}, {"q": 10**400}],
    "use_dora": ["yes", 1, None],
    "lora_bias": ["yes", 1, None],
    "target_parameters": ["experts.down_proj", [""], [1], ["a", "a"]],
    "trainable_token_indices": [[-1], [1, 1], [1.0], {"": [1]}, {"embed": []}, {"embed": [True]}, 3, "1"],
    "layer_replication": [[(2, 2)], [(3, 1)], [(-1, 2)], [(1,)], [1, 2], "0-4", [("0", "4")]],
    "ensure_weight_tying": ["yes", 1, None],
    "alora_invocation_tokens": [[], [-1], ["a"], 5, [True], "text"],
    "loftq_config": [4, "4"],
    "eva_config": ["rho"],
    "corda_config": [True],
    "lora_ga_config": [["ArB2r"]],
    "runtime_config": [True],
}


def cases(table):
    return [
        pytest.param(name, value, id=f"{name}={value!r}"[:50]) for name, values in table.items() for value in values
    ]


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_allowed_values(name, value):
    LoraConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_refused_values_are_named_with_what_is_allowed(name, value):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{name: value})
    message = str(caught.value)
    assert f"{name}={value!r}: must be " in message or f"{name}={value!r}: must map " in message


def test_every_field_has_good_and_bad_values_here():
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert fields == set(BAD)
    assert fields - {"layers_pattern"} == set(GOOD)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_alpha=NAN, lora_dropout=-0.1, bias="lora-only", use_rslora="false")
    for name in ("r=0", "lora_alpha=nan", "lora_dropout=-0.1", "bias='lora-only'", "use_rslora='false'"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"target_modules": "(q_proj"}, "'(q_proj' is not a regular expression: missing ), unterminated subpattern at"),
        ({"exclude_modules": "*head"}, "'*head' is not a regular expression: nothing to repeat at position 0"),
        ({"layers_pattern": ["(h"], "layers_to_transform": 0}, "'(h' is not a regular expression"),
        ({"rank_pattern": {"q_proj": 4, "v_proj)": 4}}, "'v_proj)' is not a regular expression: unbalanced"),
        ({"alpha_pattern": {"[a-": 4}}, "'[a-' is not a regular expression"),
        ({"target_modules": "a" * 2000}, "has 2,000 characters"),
    ],
)
def test_a_broken_expression_is_told_where_it_breaks(fields, why):
    with pytest.raises(ConfigError, match="must") as caught:
        LoraConfig(**fields)
    assert why in str(caught.value)


def test_an_expression_that_only_one_engine_knows_is_refused():
    # PEFT reads the file with `re`; \p{L} is an error there
    with pytest.raises(ConfigError, match="bad escape"):
        LoraConfig(target_modules=r"\p{L}+")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"target_modules": ".*q", "layers_to_transform": 0}, "write the layer numbers into the expression"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern does nothing without layers_to_transform"),
        ({"target_modules": ["q", "head"], "modules_to_save": ["head"]}, "head is in both"),
    ],
)
def test_settings_that_cannot_both_be_meant(fields, why):
    with pytest.raises(ConfigError, match=why):
        LoraConfig(**fields)


def test_all_linear_goes_with_layers():
    config = LoraConfig(target_modules="all-linear", layers_to_transform=[0], layers_pattern="h")
    assert config.layers_pattern == "h"


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"rank": 8}, "rank: no such field, did you mean 'r'?"),
        ({"alpha": 8}, "did you mean 'lora_alpha'?"),
        ({"lora_aplha": 8}, "did you mean 'lora_alpha'?"),
        ({"dropout": 0.1}, "did you mean 'lora_dropout'?"),
        ({"target_module": ["q"]}, "did you mean 'target_modules'?"),
        ({"zzz": 1}, "zzz: no such field"),
        ({"kasa_config": {"beta": 1}}, "kasa_config={'beta': 1}: not available yet; leave it out"),
        ({"use_qalora": True}, "use_qalora=True: not available yet"),
        ({"loftq_config": {"bits": 4}}, "LoftQConfig cannot be made"),
        ({"peft_type": "IA3"}, "only 'LORA' adapters can be used"),
    ],
)
def test_fields_that_do_not_exist(fields, hint):
    with pytest.raises(UnknownFieldError) as caught:
        LoraConfig(**fields)
    assert hint in str(caught.value)


def test_unknown_fields_are_named_together():
    with pytest.raises(UnknownFieldError, match=r"rank: .*\n  zzz: "):
        LoraConfig(rank=8, zzz=1)


def test_fields_of_peft_that_are_not_used_may_be_given():
    given = {
        "loftq_config": {},
        "target_parameters": None,
        "use_qalora": False,
        "peft_type": "LORA",
        "auto_mapping": None,
    }
    assert LoraConfig(r=4, **given) == LoraConfig(r=4)


def test_the_signature_shows_the_fields():
    assert list(inspect.signature(LoraConfig).parameters) == [f.name for f in dataclasses.fields(LoraConfig)]


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("target_modules", {"v", "q"}, ["q", "v"]),
        ("target_modules", ("v", "q"), ["v", "q"]),
        ("target_modules", frozenset({"b", "a", "c"}), ["a", "b", "c"]),
        ("target_modules", "ALL-LINEAR", "all-linear"),
        ("init_lora_weights", "OLoRA", "olora"),
        ("init_lora_weights", "PiSSA_niter_4", "pissa_niter_4"),
        ("exclude_modules", {"b", "a"}, ["a", "b"]),
        ("modules_to_save", "lm_head", ["lm_head"]),
        ("modules_to_save", ("a", "b"), ["a", "b"]),
        ("layers_to_transform", {2, 0}, [0, 2]),
        ("layers_to_transform", range(2), [0, 1]),
        ("layers_to_transform", [], None),
        ("rank_pattern", None, {}),
        ("lora_alpha", 16.0, 16),
        ("lora_alpha", 0.5, 0.5),
        ("task_type", "CAUSAL_LM", TaskType.CAUSAL_LM),
    ],
)
@pytest.mark.parametrize("how", ["given", "assigned"])
def test_values_are_kept_in_one_form(name, given, kept, how):
    if how == "given":
        config = LoraConfig(**{name: given})
    else:
        config = LoraConfig()
        setattr(config, name, given)
        config.check()
    value = getattr(config, name)
    assert (value, type(value)) == (kept, type(kept))


def test_a_set_is_written_the_same_each_time():
    names = [f"proj_{i}" for i in range(20)]
    assert LoraConfig(target_modules=set(names)).to_json() == LoraConfig(target_modules=set(reversed(names))).to_json()


# Assignment


def test_an_assigned_value_is_checked_before_it_is_used():
    config = LoraConfig()
    config.r = 0
    with pytest.raises(ConfigError, match="r=0"):
        config.check()
    with pytest.raises(ConfigError, match="r=0"):
        config.changed(lora_alpha=4)


def test_a_misspelt_assignment_is_refused():
    with pytest.raises(UnknownFieldError, match="did you mean 'lora_alpha'"):
        LoraConfig().lora_aplha = 32
    with pytest.raises(UnknownFieldError, match="not available yet"):
        LoraConfig().kasa_config = {"beta": 1}


def test_changed_is_an_independent_copy():
    config = LoraConfig(target_modules=["q"], rank_pattern={"q": 4})
    other = config.changed(r=2)
    other.target_modules.append("v")
    other.rank_pattern["v"] = 1
    assert (config.r, config.target_modules, config.rank_pattern) == (8, ["q"], {"q": 4})
    assert other.r == 2


def test_changed_refuses_unknown_fields():
    with pytest.raises(UnknownFieldError, match="did you mean 'r'"):
        LoraConfig().changed(rank=2)


FREE = {"base_model_name_or_path": "m", "revision": "v", "inference_mode": True, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(LoraConfig) if f.name not in FREE])
def test_a_config_in_use_is_closed(name):
    config = LoraConfig(target_modules=["q"], layers_to_transform=0, layers_pattern="h").in_use()
    before = config.to_dict()
    with pytest.raises(ConfigError, match=f"{name} cannot be changed to .* Make a new LoraConfig"):
        setattr(config, name, next(iter(GOOD.get(name, ["x"]))))
    assert config.to_dict() == before


def test_a_start_set_to_true_before_saving_as_for_peft_is_told_that_saving_needs_it_not():
    config = LoraConfig(init_lora_weights="pissa").in_use()
    with pytest.raises(ConfigError, match=r"save_pretrained does so, and remembers the start; leave the line out\.$"):
        config.init_lora_weights = True
    assert config.init_lora_weights == "pissa"


@pytest.mark.parametrize(("name", "value"), FREE.items())
def test_a_config_in_use_may_change_what_no_number_depends_on(name, value):
    config = LoraConfig().in_use()
    setattr(config, name, value)
    assert getattr(config, name) == value


def test_the_original_stays_open_and_a_changed_copy_opens():
    config = LoraConfig()
    closed = config.in_use(r=4)
    config.r = 2
    opened = closed.changed()
    opened.r = 3
    assert (config.r, closed.r, opened.r) == (2, 4, 3)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal_and_stay_closed(again):
    config = LoraConfig(r=4, target_modules=["q"], task_type="CAUSAL_LM", rank_pattern={"q": 2})
    assert again(config) == config
    again(config).r = 5
    with pytest.raises(ConfigError, match="cannot be changed"):
        again(config.in_use()).r = 5


def test_dataclass_tools_work():
    config = LoraConfig(r=4)
    assert dataclasses.replace(config, r=2) == LoraConfig(r=2)
    assert dataclasses.asdict(config)["r"] == 4


def test_it_is_not_a_base_class():
    with pytest.raises(TypeError, match="not meant to be subclassed"):
        type("Mine", (LoraConfig,), {})


# Files

WRITTEN = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]},
    "all fields": {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/model",
        "revision": "main",
        "inference_mode": True,
        "r": 3,
        "target_modules": ["q_proj", "lm_head"],
        "exclude_modules": ["k_proj"],
        "lora_alpha": 0.5,
        "lora_dropout": 0.1,
        "bias": "lora_only",
        "use_rslora": True,
        "modules_to_save": ["embed_tokens"],
        "init_lora_weights": "gaussian",
        "layers_to_transform": [0, 1],
        "layers_pattern": ["layers"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 4.5},
        "use_dora": True,
    },
    "expression": {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.1\..*", "fan_in_fan_out": True},
    "random start": {"target_modules": ["q_proj"], "init_lora_weights": False},
}


@pytest.mark.parametrize("fields", WRITTEN.values(), ids=WRITTEN)
def test_a_file_gives_the_same_config_back(fields, tmp_path):
    config = LoraConfig(**fields)
    config.save_pretrained(tmp_path / "new" / "folder")
    assert LoraConfig.from_pretrained(tmp_path / "new" / "folder") == config


@pytest.mark.parametrize("fields", WRITTEN.values(), ids=WRITTEN)
def test_peft_reads_what_is_written_here(fields, tmp_path):
    LoraConfig(**fields).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.LoraConfig.from_pretrained(str(tmp_path))
    for name, value in LoraConfig(**fields).to_dict().items():
        other = getattr(theirs, name)
        assert (sorted(other) if isinstance(other, set) else other) == (
            sorted(value) if isinstance(value, list) else value
        )


@pytest.mark.parametrize("fields", WRITTEN.values(), ids=WRITTEN)
def test_what_peft_writes_is_read_here(fields, tmp_path):
    peft.LoraConfig(**fields).save_pretrained(str(tmp_path))
    config = LoraConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        mine = getattr(config, name)
        assert (sorted(mine) if name == "target_modules" and isinstance(mine, list) else mine) == (
            sorted(value) if name == "target_modules" and isinstance(value, list) else value
        )


def test_defaults_are_those_of_peft():
    theirs = peft.LoraConfig()
    ours = LoraConfig()
    for f in dataclasses.fields(LoraConfig):
        mine, peers = getattr(ours, f.name), getattr(theirs, f.name)
        if f.name == "runtime_config":
            mine, peers = dataclasses.asdict(mine), dataclasses.asdict(peers)
        assert mine == peers or (mine is None and peers == {}), f.name


def test_every_field_of_peft_is_known():
    theirs = json.loads(json.dumps(peft.LoraConfig(target_modules=["q"]).to_dict(), default=list))
    assert LoraConfig.from_dict(theirs) == LoraConfig(target_modules=["q"])


def test_the_order_of_patterns_survives_a_file(tmp_path):
    # the first key that matches counts, so sorting them would change the adapter
    ordered = {r"layers\.0\..*q_proj": 16, "[kq]_proj": 4}
    assert list(ordered) != sorted(ordered)
    LoraConfig(rank_pattern=ordered, alpha_pattern=ordered, target_modules=["q_proj"]).save_pretrained(tmp_path)
    back = LoraConfig.from_pretrained(tmp_path)
    assert list(back.rank_pattern) == list(back.alpha_pattern) == list(ordered)
    assert rank_and_alpha(back, "model.layers.0.self_attn.q_proj") == (16, 16)
    assert list(peft.LoraConfig.from_pretrained(str(tmp_path)).rank_pattern) == list(ordered)


def file_data(**changes):
    data = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], **changes}
    return {name: value for name, value in data.items() if value is not ...}


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_file_must_say_what_cannot_be_guessed(name):
    with pytest.raises(ConfigError, match=f"{name}: missing, and a default would be a guess"):
        LoraConfig.from_dict(file_data(**{name: ...}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA': only 'LORA'"),
        ({"peft_type": "LORRA"}, "only 'LORA'"),
        ({"target_modules": None}, "does not say which layers were trained"),
        ({"lora_alpah": 64}, "lora_alpah=64: unknown field, did you mean 'lora_alpha'\\?; it may change"),
        ({"new_feature": {"x": 1}}, "new_feature={'x': 1}: unknown field; it may change what the adapter computes"),
        ({"use_qalora": True}, "use_qalora=True: not available yet"),
        ({"kasa_config": {"beta": 1}}, "kasa_config={'beta': 1}: not available yet"),
        ({"r": "8"}, "r='8': must be an integer"),
        ({"use_rslora": "false"}, "use_rslora='false': must be True or False"),
        ({"use_dora": "yes"}, "use_dora='yes'"),
        ({"lora_alpha": INF}, "lora_alpha=inf"),
    ],
)
def test_a_file_that_would_be_misread_is_refused(changes, why):
    with pytest.raises(ConfigError, match=why) as caught:
        LoraConfig.from_dict(file_data(**changes), source="some/file.json")
    assert str(caught.value).startswith("some/file.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"new_feature": None},
        {"new_feature": False},
        {"new_feature": {}},
        {"new_feature": []},
        {"peft_version": "9.0", "auto_mapping": {"a": "b"}, "qalora_group_size": 32, "megatron_core": "x"},
    ],
)
def test_unknown_fields_that_are_not_used_do_not_matter(changes):
    assert LoraConfig.from_dict(file_data(**changes)) == LoraConfig.from_dict(file_data())


def test_the_repeated_heads_that_peft_writes_are_read_once():
    config = LoraConfig.from_dict(file_data(modules_to_save=["classifier", "classifier", "score"]))
    assert config.modules_to_save == ["classifier", "score"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(AdapterFileError, match="nowhere"):
        LoraConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match="There is no adapter_config.json in"):
        LoraConfig.from_pretrained(tmp_path)


# Patterns


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "model.q_proj", False),
        ("q_proj", "model.q_proj.inner", False),
        (r"layers\.[01]\..*", "model.layers.1.mlp.up", True),
        (r"layers\.[01]\..*", "model.layers.2.mlp.up", False),
        ("q_proj|v_proj", "model.v_proj", True),
        ("^model.*q_proj", "model.layers.0.q_proj", True),
        ("^layers.*q_proj", "model.layers.0.q_proj", False),
    ],
)
def test_pattern_keys_match_the_end_at_a_dot_as_in_peft(pattern, path, expected):
    assert matches_end(pattern, path) is expected
    assert (peft.utils.other.get_pattern_key([pattern], path) == pattern) is (expected and pattern != path) or (
        pattern == path
    )


def test_the_first_pattern_counts():
    config = LoraConfig(r=8, rank_pattern={"layers.0.q": 2, "q": 4}, alpha_pattern={"v": 1})
    assert rank_and_alpha(config, "m.layers.0.q") == (2, 8)
    assert rank_and_alpha(config, "m.layers.1.q") == (4, 8)
    assert rank_and_alpha(config, "m.layers.1.v") == (8, 1)


def test_a_pattern_that_never_ends_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match=r"takes over 1 s on 'a+'. Nested repetitions such as \(a\+\)\+ do that"):
        matches("(a{1,30}){1,30}[!?]", "a" * 40)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config does nothing without init_lora_weights='loftq'"),
        ({"init_lora_weights": "eva", "corda_config": {"corda_method": "kpm"}}, "corda_config does nothing without"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho=0.5"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "ephemeral_gpu_offload does nothing here"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias cannot go with use_dora"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias goes with init_lora_weights True or False"),
    ],
)
def test_settings_of_methods_that_are_not_used_are_refused(fields, why):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**fields)
    assert why in str(caught.value)


@pytest.mark.parametrize("method", ["loftq", "eva", "corda", "lora_ga"])
def test_the_settings_of_a_method_are_written_as_peft_writes_them(method, tmp_path):
    settings = {
        "loftq": {"loftq_iter": 3},
        "eva": {"rho": 3.0},
        "corda": {"verbose": True},
        "lora_ga": {"scale": "unit"},
    }
    field = f"{method}_config"
    ours = LoraConfig(init_lora_weights=method, target_modules=["q"], **{field: settings[method]})
    theirs = peft.LoraConfig(
        init_lora_weights=method,
        target_modules=["q"],
        **{field: getattr(peft.tuners.lora.config, type(getattr(ours, field)).__name__)(**settings[method])},
    )
    theirs.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ours.to_dict()[field] == written[field]
    assert LoraConfig.from_dict({**ours.to_dict(), "peft_type": "LORA"}).to_dict()[field] == (
        None if method == "eva" else written[field]
    )

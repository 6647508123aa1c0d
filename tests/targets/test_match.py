import re
import time
import warnings

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

from targets.models import MAKERS, materialised, skeleton
from veneer import LoraConfig, get_peft_model
from veneer.errors import ConfigError, TargetError, VeneerWarning
from veneer.targets import preview, resolve

# the models here are so small that a rank of 8 is above what some of their layers can have
pytestmark = pytest.mark.filterwarnings("ignore:.*rank above what their weight can have")

LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def sites(model_name, **fields):
    return [site.path for site in resolve(skeleton(model_name), LoraConfig(**fields)).sites]


def ends(paths):
    return sorted({path.rpartition(".")[2] for path in paths})


def refusal(model_name, **fields):
    with pytest.raises(TargetError) as caught:
        resolve(skeleton(model_name), LoraConfig(**fields))
    return str(caught.value)


# What a config means


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        ("llama", {"target_modules": ["q_proj"]}, [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]),
        (
            "llama",
            {"target_modules": ["0.self_attn.q_proj", "lm_head"]},
            ["model.layers.0.self_attn.q_proj", "lm_head"],
        ),
        ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}, ["model.layers.1.mlp.up_proj"]),
        ("llama", {"target_modules": ["embed_tokens"]}, ["model.embed_tokens"]),
        ("llama", {"target_modules": r".*\.[02]\..*q_proj"}, [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]),
        (
            "llama",
            {"target_modules": ["q_proj"], "exclude_modules": ["3.self_attn.q_proj"]},
            [f"model.layers.{i}.self_attn.q_proj" for i in range(3)],
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "exclude_modules": r".*\.[0-2]\..*"},
            ["model.layers.3.self_attn.q_proj"],
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "layers_to_transform": 2},
            ["model.layers.2.self_attn.q_proj"],
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "layers_to_transform": [3, 0]},
            ["model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.q_proj"],
        ),
        (
            "llama body",
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            ["layers.1.self_attn.q_proj"],
        ),
        (
            "gpt2",
            {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["h"]},
            ["transformer.h.1.attn.c_attn"],
        ),
        # the first number counts, not an expert's
        (
            "nested",
            {"target_modules": ["0", "1"], "layers_to_transform": [1], "layers_pattern": "experts"},
            ["body.experts.1.parts.0", "body.experts.1.parts.1"],
        ),
        (
            "nested",
            {"target_modules": ["fc"], "exclude_modules": ["act.fc"]},
            ["fc", *(f"body.blocks.{i}.fc" for i in range(3))],
        ),
    ],
)
def test_names_and_expressions(model, fields, expected):
    assert sites(model, **fields) == expected


@pytest.mark.parametrize("target", [None, "all-linear"])
@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        ("llama", {}, LLAMA_LINEAR),
        ("llama body", {}, LLAMA_LINEAR),
        ("gpt2", {}, ["c_attn", "c_fc", "c_proj"]),
        ("bert filler", {}, ["dense", "key", "query", "value"]),
        ("bert classifier", {"task_type": "SEQ_CLS"}, ["dense", "key", "query", "value"]),
        ("bert tagger", {"task_type": "TOKEN_CLS"}, ["dense", "key", "query", "value"]),
        ("bert reader", {"task_type": "QUESTION_ANS"}, ["dense", "key", "query", "value"]),
        ("llama", {"exclude_modules": ["up_proj", "gate_proj", "down_proj"]}, LLAMA_LINEAR[:4]),
        ("llama", {"exclude_modules": ".*mlp.*"}, LLAMA_LINEAR[:4]),
        ("llama", {"modules_to_save": ["mlp"]}, LLAMA_LINEAR[:4]),
    ],
)
def test_all_linear_is_every_linear_layer_but_the_head(target, model, fields, expected):
    assert ends(sites(model, target_modules=target, **fields)) == sorted(expected)


def test_all_linear_goes_with_layers():
    found = sites("llama", layers_to_transform=[1, 2])
    assert len(found) == 14
    assert {path.split(".")[2] for path in found} == {"1", "2"}


def test_ranks_alphas_and_scales_of_sites():
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 4},
        alpha_pattern={"v_proj": 8},
        use_rslora=True,
    )
    found = {site.path: site for site in resolve(skeleton("llama"), config).sites}
    q0, q1, v0 = (
        found[f"model.layers.{path}"] for path in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.self_attn.v_proj")
    )
    assert [(s.rank, s.alpha) for s in (q0, q1, v0)] == [(2, 16), (4, 16), (8, 8)]
    assert (q1.scale, v0.scale) == (8.0, pytest.approx(8 / 8**0.5))
    assert (q0.shape, v0.shape) == ((32, 32), (16, 32))


def test_the_shape_of_a_conv1d_is_out_by_in():
    shapes = {site.path.rpartition(".")[2]: site.shape for site in resolve(skeleton("gpt2"), LoraConfig()).sites}
    assert shapes["c_attn"] == (96, 32)
    assert shapes["c_fc"] == (128, 32)


# Heads and modules trained in full


@pytest.mark.parametrize(
    ("model", "task", "given", "saved"),
    [
        ("bert classifier", "SEQ_CLS", None, ["classifier"]),
        ("bert classifier", "SEQ_CLS", ["classifier", "score"], ["classifier"]),  # as PEFT writes it
        ("bert tagger", "TOKEN_CLS", None, ["classifier"]),
        ("bert reader", "QUESTION_ANS", None, ["qa_outputs"]),
        ("roberta classifier", "SEQ_CLS", None, ["classifier"]),
        ("bert classifier", None, ["pooler"], ["bert.pooler"]),
        ("bert classifier", "SEQ_CLS", ["pooler"], ["bert.pooler", "classifier"]),
        ("llama", None, ["embed_tokens", "lm_head"], ["model.embed_tokens", "lm_head"]),
        ("llama", None, ["model", "model.norm"], ["model"]),
    ],
)
def test_modules_trained_in_full(model, task, given, saved):
    target = ["query"] if "bert" in model else ["lm_head"] if given == ["model", "model.norm"] else ["q_proj"]
    config = LoraConfig(target_modules=target, task_type=task, modules_to_save=given)
    resolution = resolve(skeleton(model), config)
    assert list(resolution.saved) == saved
    assert all(any(path == name or path.endswith(f".{name}") for name in resolution.modules_to_save) for path in saved)


def test_a_task_assigned_later_counts_too():
    config = LoraConfig(target_modules=["query"])
    config.task_type = "SEQ_CLS"
    assert resolve(skeleton("bert classifier"), config).saved == ("classifier",)


def test_a_classifier_without_a_head_is_said():
    with pytest.warns(VeneerWarning, match="LlamaModel has no classifier or score"):
        resolve(skeleton("llama body"), LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))


def test_names_match_at_a_dot():
    # PEFT takes "proj" for the end of "q_proj" in modules_to_save
    assert "modules_to_save: 'proj' matches nothing" in refusal(
        "llama", target_modules=["q_proj"], modules_to_save=["proj"]
    )


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", 0), ("lora_only", 2), ("all", 2 * 8 + 3)],
)
def test_biases(bias, expected):
    config = LoraConfig(target_modules=["query"], bias=bias)
    found = resolve(skeleton("bert classifier"), config).biases
    assert len(found) == expected
    assert all(name.endswith(".bias") for name in found)
    if bias == "lora_only":
        assert found[0] == "bert.encoder.layer.0.attention.self.query.bias"


def test_biases_of_saved_modules_are_not_counted_twice():
    config = LoraConfig(target_modules=["query"], bias="all", task_type="SEQ_CLS")
    assert "classifier.bias" not in resolve(skeleton("bert classifier"), config).biases


# What cannot be meant


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_porj"]}, "target_modules: 'q_porj' matches nothing; did you mean q_proj (4 layers)?"),
        ({"target_modules": ["q_proj", "v_prjo"]}, "'v_prjo' matches nothing; did you mean v_proj (4 layers)?"),
        ({"target_modules": ["lm_heads"]}, "did you mean lm_head (1 layer)?"),
        ({"target_modules": ["zzzzz"]}, "'zzzzz' matches nothing; there are q_proj (4 layers), k_proj (4 layers)"),
        (
            {"target_modules": "q_proj"},
            "'q_proj' is a string, so a regular expression for the whole path; write ['q_proj']",
        ),
        ({"target_modules": [".*q_proj", "v_proj"]}, "'.*q_proj' matches nothing; did you mean q_proj"),
        ({"target_modules": [r".*\d$"]}, "an entry of a list is a name, give a regular expression as a string"),
        ({"target_modules": ["all-linear"]}, "give it alone as target_modules, not in a list"),
        (
            {"target_modules": ["self_attn"]},
            "LlamaAttention is not a kind of layer that can be adapted (it holds q_proj, k_proj",
        ),
        (
            {"target_modules": ["norm"]},
            "LlamaRMSNorm is not a kind of layer that can be adapted (Conv1D, Conv1d, Conv2d, ",
        ),
        (
            {"exclude_modules": ["up_porj"]},
            "exclude_modules: 'up_porj' matches nothing; did you mean up_proj (4 layers)?",
        ),
        ({"exclude_modules": ["mlp"]}, "'mlp' holds layers but is none; for those inside it write exclude_modules="),
        ({"target_modules": ["q_proj"], "exclude_modules": ".*"}, "no layer is left to adapt"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_heda"]},
            "modules_to_save: 'lm_heda' matches nothing; did",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_token"]},
            "'embed_token' matches nothing; did you mean embed_tokens (1 layer)?",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
            "'q_proj' means only modules that modules_to_save",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"q_prj": 2}},
            "rank_pattern: 'q_prj' matches nothing; did you mean q",
        ),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "rank_pattern: 'v_proj' matches nothing"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, "alpha_pattern: 'v_proj' matches nothing"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, "0.self_attn.q_proj": 4}},
            "rank_pattern: '0.self_attn.q_proj' has no effect, keys before it match the same layers; put it first",
        ),
        (
            {"rank_pattern": {"mlp": 4}},
            r"'mlp' holds layers but is none; for those inside it write rank_pattern={'(.*\\.)?mlp\\..*': …}",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [99]},
            "no targeted layer has index 99; there are 0 to 3",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 99]},
            "no targeted layer has index 99; there are 0 to 3",
        ),
        ({"target_modules": ["lm_head"], "layers_to_transform": [0]}, "no targeted layer has a number"),
        (
            {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
            "'lm_head' means lm_head, which layers_to_transform leaves out",
        ),
        (
            {"target_modules": ["model.layers.1.mlp.up_proj", "q_proj"], "layers_to_transform": [0]},
            "'model.layers.1.mlp.up_proj' means model.layers.1.mlp.up_proj, which layers_to_transform leaves out",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "block"},
            "no targeted layer has a number where it is looked for; layers_pattern can be 'layers'",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "blokcs"]},
            "layers_pattern: 'blokcs' matches nothing; there are layers",
        ),
        (
            {"target_modules": ["q_proj"], "fan_in_fan_out": True},
            "fan_in_fan_out=True: the targets store their weight as",
        ),
    ],
)
def test_what_matches_nothing_is_told_with_what_there_is(fields, expected):
    message = refusal("llama", **fields)
    assert message.startswith("1 setting does not fit LlamaForCausalLM:\n")
    assert expected in message


def test_the_suggested_expression_for_a_container_works():
    for field in ("exclude_modules", "rank_pattern"):
        message = refusal("llama", **{field: ["mlp"] if field == "exclude_modules" else {"mlp": 4}})
        pattern = re.search(r"'(\(.*?)'", message.partition("write")[2])[1].replace("\\\\", "\\")
        config = LoraConfig(**{field: pattern if field == "exclude_modules" else {pattern: 4}})
        mlp = [s for s in resolve(skeleton("llama"), config).sites if ".mlp." in s.path]
        assert [s.rank for s in mlp] == ([] if field == "exclude_modules" else [4] * 12)


def test_a_body_without_a_prefix_is_told_about_layers_pattern():
    message = refusal("llama body", target_modules=["q_proj"], layers_to_transform=[0])
    assert "layers_pattern can be 'layers'" in message


def test_excluding_what_is_not_targeted_is_no_mistake():
    # a file that was made from "all-linear" says just that
    assert ends(sites("llama", target_modules=["q_proj"], exclude_modules=["v_proj"])) == ["q_proj"]


def test_a_layer_that_no_name_can_single_out_is_told():
    model = skeleton("nested")
    with pytest.raises(
        TargetError, match="no name in an adapter file can mean fc without act.fc, .* regular expression"
    ):
        resolve(model, LoraConfig(r=2))
    assert [site.path for site in resolve(model, LoraConfig(r=2, target_modules=r"fc|body\.blocks.*fc")).sites][
        0
    ] == "fc"


def test_every_problem_is_named_at_once():
    message = refusal(
        "llama", target_modules=["q_porj", "v_proj"], modules_to_save=["lm_heda"], rank_pattern={"k_proj": 2}
    )
    assert message.startswith("3 settings do not fit")
    for name in ("q_porj", "lm_heda", "k_proj"):
        assert name in message


def test_a_name_that_peft_would_take_for_a_path_is_refused():
    # PEFT adapts fc at the top too: layers_to_transform does not count for a name that is a full path
    assert "'fc' means fc and 6 more, which" in refusal("twice", target_modules=["fc"], layers_to_transform=[1])
    assert len(sites("twice", target_modules=["0.fc", "1.fc"], layers_to_transform=[1])) == 2


def test_equal_refusals_are_one_line():
    assert len(refusal("llama", target_modules=["self_attn"]).splitlines()) == 2
    assert "model.layers.0.self_attn and 3 more cannot" in refusal("llama", target_modules=["self_attn"])


def test_only_layers_that_are_chosen_must_be_adaptable():
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"fc": fc}) for fc in (torch.nn.Identity(), torch.nn.Linear(9, 9)))
    model = torch.nn.ModuleDict({"body": torch.nn.ModuleDict({"blocks": blocks})})
    config = LoraConfig(target_modules=["fc"], layers_to_transform=[1])
    assert [site.path for site in resolve(model, config).sites] == ["body.blocks.1.fc"]


def test_a_part_of_attention_is_not_named_alone():
    message = refusal("attention", target_modules=["out_proj"])
    assert "attention.out_proj cannot be adapted: MultiheadAttention reads its weight without calling it" in message
    assert "name the attention module, of which it is a part" in message


def test_a_model_without_linear_layers():
    with pytest.raises(TargetError, match="there is no linear layer to adapt"):
        resolve(torch.nn.Sequential(torch.nn.ReLU()), LoraConfig())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.{1,30}){1,30}[!?]"},
        {"target_modules": ["q_proj"], "exclude_modules": "(.{1,30}){1,30}[!?]"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(.{1,30}){1,30}[!?]": 4}},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(.{1,30}){1,30}[!?]"},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_an_expression_that_never_ends_is_an_error_within_seconds(fields):
    model, start = skeleton("llama"), time.process_time()  # of this process, however busy the machine is
    with pytest.raises(ConfigError, match="takes over 1 s"):
        resolve(model, LoraConfig(**fields))
    assert time.process_time() - start < 4


def test_a_rank_above_what_a_weight_can_have_is_said():
    with pytest.warns(VeneerWarning, match="above what their weight can have"):
        resolve(skeleton("llama"), LoraConfig(r=64, target_modules=["q_proj"]))


def test_resolving_changes_nothing():
    model = skeleton("llama")
    before = [(name, type(module)) for name, module in model.named_modules()]
    config = LoraConfig(target_modules={"q_proj", "v_proj"})
    text = config.to_json()
    resolve(model, config)
    preview(model, config)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert config.to_json() == text


def test_an_adapted_model_resolves_like_the_bare_one():
    model = materialised("llama")
    config = LoraConfig(modules_to_save=["lm_head"])
    bare = [site.path for site in resolve(model, config).sites]
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    assert [site.path for site in resolve(wrapped.get_base_model(), config).sites] == bare


# The same layers as PEFT

CONFIGS = {
    "names": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "long names": ("llama", {"target_modules": ["self_attn.q_proj", "model.layers.3.mlp.up_proj", "lm_head"]}),
    "expression": ("llama", {"target_modules": r".*layers\.[13]\.(self_attn|mlp)\.(q|up)_proj"}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "all linear, no prefix": ("llama body", {"target_modules": "all-linear"}),
    "all linear, excluded": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "0.mlp.down_proj"]},
    ),
    "all linear, excluded by expression": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.2\..*"}),
    "all linear, saved": ("llama", {"target_modules": "all-linear", "modules_to_save": ["self_attn"]}),
    "all linear, gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "all linear, bert filler": ("bert filler", {"target_modules": "all-linear"}),
    "all linear, bert classifier": ("bert classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all linear, roberta classifier": ("roberta classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all linear, no task": ("bert classifier", {"target_modules": "all-linear"}),
    "all linear, t5": ("t5", {"target_modules": "all-linear"}),
    "one layer": ("llama", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 3], "layers_pattern": "layers"}),
    "layers of gpt2": (
        "gpt2",
        {"target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
    ),
    "layers of bert": ("bert filler", {"target_modules": ["query", "dense"], "layers_to_transform": [1]}),
    "two lists": ("nested", {"target_modules": ["0", "body.blocks.0.fc"], "layers_to_transform": [0]}),
    "lists in lists": ("twice", {"target_modules": ["1.fc"], "layers_to_transform": [1]}),
    "named lists in lists": (
        "twice",
        {"target_modules": ["0.fc"], "layers_to_transform": [2], "layers_pattern": "layers"},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.[01]\..*q_proj": 2, "^model.layers.3.self_attn.v_proj": 3, "v_proj": 5},
            "alpha_pattern": {"0.self_attn.q_proj": 3, "(q|v)_proj": 7},
        },
    ),
    "saved": ("bert classifier", {"target_modules": ["query"], "modules_to_save": ["pooler"], "task_type": "SEQ_CLS"}),
}


def in_peft(model_name, fields):
    """{path: (rank, scale)} and the paths of saved modules, as PEFT injects them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(materialised(model_name), peft.LoraConfig(**fields)).get_base_model()
    layers = {
        p: (m.r["default"], m.scaling["default"]) for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }
    return layers, {p for p, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


@pytest.mark.parametrize(("model", "fields"), CONFIGS.values(), ids=CONFIGS)
def test_the_layers_are_those_of_peft(model, fields):
    resolution = resolve(skeleton(model), LoraConfig(**fields))
    layers, saved = in_peft(model, fields)
    assert {site.path: (site.rank, pytest.approx(site.scale)) for site in resolution.sites} == layers
    assert set(resolution.saved) == saved


ON_DISK = {
    **{name: case for name, case in CONFIGS.items() if case[1]["target_modules"] == "all-linear"},
    # PEFT cannot apply this itself, but reads the names
    "all linear, bert tagger": ("bert tagger", {"target_modules": "all-linear", "task_type": "TOKEN_CLS"}),
    "all linear, some layers": ("llama", {"target_modules": "all-linear", "layers_to_transform": [1, 2]}),
    "all linear, a layer at the top": ("twice", {"target_modules": "all-linear", "layers_to_transform": [1]}),
    "all linear, one block": (
        "nested",
        {"target_modules": "all-linear", "layers_to_transform": [2], "layers_pattern": "blocks", "r": 2},
    ),
    "all linear, one layer of experts": (
        "nested",
        {"target_modules": "all-linear", "layers_to_transform": [1], "layers_pattern": "experts", "r": 2},
    ),
}


@pytest.mark.parametrize(("model", "fields"), ON_DISK.values(), ids=ON_DISK)
def test_the_names_on_disk_mean_the_same_layers_in_peft_and_here(model, fields):
    resolution = resolve(materialised(model), LoraConfig(**fields))
    on_disk = {**fields, "target_modules": resolution.target_modules}
    assert isinstance(resolution.target_modules, list)
    layers, _ = in_peft(model, on_disk)
    assert set(layers) == {site.path for site in resolution.sites}
    again = resolve(materialised(model), LoraConfig(**on_disk))
    assert again.sites == resolution.sites
    assert again.target_modules == resolution.target_modules


def test_the_names_on_disk_are_short():
    assert resolve(skeleton("llama"), LoraConfig()).target_modules == sorted(LLAMA_LINEAR)


def test_a_list_stays_as_given_but_sorted():
    config = LoraConfig(target_modules=["v_proj", "self_attn.q_proj"])
    assert resolve(skeleton("llama"), config).target_modules == ["self_attn.q_proj", "v_proj"]


def test_an_expression_stays_as_given():
    config = LoraConfig(target_modules=r".*q_proj")
    assert resolve(skeleton("llama"), config).target_modules == r".*q_proj"


@pytest.mark.parametrize("model", MAKERS)
def test_every_model_here_can_be_made_without_weights(model):
    assert all(parameter.is_meta for parameter in skeleton(model).parameters())

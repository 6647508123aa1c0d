"""add_weighted_adapter: against PEFT's where PEFT is right, and against sums in float64 where it is not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model as peft_model
from torch import nn

import veneer
from parity.oracle import quietly, read_by_peft
from tiny import Stack, bert, gpt2, ids, llama, shake
from veneer import LoraConfig, get_peft_model
from veneer.errors import AdapterNameError, ConfigError, MergeError, VeneerError, VeneerWarning
from veneer.functional.combine import COMBINATIONS
from veneer.layers.attach import adapter_on
from veneer.model.merge import merge

WEIGHTS = [0.7, -1.3]
SVD = [name for name, method in COMBINATIONS.items() if method.uses_svd]
ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
MIXED = {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "gate_proj"]}


def options(kind: str) -> dict:
    """A density of 1 leaves nothing to chance in the types that drop at random."""
    if not COMBINATIONS[kind].prunes:
        return {"combination_type": kind}
    return {"combination_type": kind, "density": 1.0 if kind.startswith("dare") else 0.6}


def pair(base: nn.Module, first: dict, second: dict, **common):
    """A model of ours with the adapters `one` and `two`, each with random values."""
    model = get_peft_model(base, LoraConfig(**first, **common), "one")
    model.add_adapter("two", LoraConfig(**second, **common))
    for seed, name in enumerate(["two", "one"]):
        model.set_adapter(name)
        shake(model, seed=seed)
    return model.eval()


def pair_of_peft(base: nn.Module, first: dict, second: dict, folder, **common):
    """The same on a model of PEFT and, loaded from its files, on one of ours."""
    torch.manual_seed(0)
    theirs = quietly(peft_model, copy.deepcopy(base), PeftLoraConfig(**first, **common), adapter_name="one")
    quietly(theirs.add_adapter, "two", PeftLoraConfig(**second, **common))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    quietly(theirs.save_pretrained, str(folder), save_embedding_layers=False)
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder / "one", "one")
    ours.load_adapter(folder / "two", "two")
    return theirs, ours


def logits(model, x=None) -> torch.Tensor:
    with torch.no_grad():
        y = model(ids() if x is None else x)
    return y if isinstance(y, torch.Tensor) else y.logits


def delta(model, path: str, *names: str, weights=None) -> torch.Tensor:
    """Σ wᵢ (W' - W) of one layer, each adapter merged by itself in float64."""
    layer = model.get_base_model().get_submodule(path)
    W = layer._parameters["weight"].detach().double()
    with torch.no_grad():
        parts = [adapter_on(layer, name).merged(W, W) - W for name in names if name in layer.adapters]
    return sum(w * part for w, part in zip(weights or [1.0] * len(parts), parts, strict=True))


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_every_type_gives_peft_s_outputs_and_peft_reads_it(kind, tmp_path):
    base = llama()
    theirs, ours = pair_of_peft(base, ATTENTION, MIXED, tmp_path / "both")
    quietly(theirs.add_weighted_adapter, ["one", "two"], WEIGHTS, "sum", **options(kind))
    ours.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", **options(kind))
    theirs.set_adapter("sum")
    ours.set_adapter("sum")
    assert torch.allclose(logits(ours), logits(theirs), atol=3e-6)
    assert not torch.allclose(logits(ours), logits(base), atol=1e-2)
    ours.save_pretrained(tmp_path / "sum", selected_adapters=["sum"])
    assert torch.allclose(logits(read_by_peft(base, tmp_path / "sum" / "sum")), logits(ours), atol=1e-6)


@pytest.mark.parametrize("kind", ["cat", *SVD])
def test_ranks_may_differ_by_adapter_and_by_layer(kind, tmp_path):
    first = {**ATTENTION, "rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 5}}
    theirs, ours = pair_of_peft(llama(), first, {**MIXED, "r": 3}, tmp_path / "both")
    rank = {} if kind == "cat" else {"svd_rank": 4}
    quietly(theirs.add_weighted_adapter, ["one", "two"], WEIGHTS, "sum", **options(kind), **rank)
    ours.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", **options(kind), **rank)
    theirs.set_adapter("sum")
    ours.set_adapter("sum")
    assert torch.allclose(logits(ours), logits(theirs), atol=3e-6)
    ours.save_pretrained(tmp_path / "sum", selected_adapters=["sum"])
    assert torch.allclose(logits(read_by_peft(llama(), tmp_path / "sum" / "sum")), logits(ours), atol=1e-6)


def test_a_rank_that_differs_is_in_the_patterns():
    model = pair(llama(), ATTENTION, {**MIXED, "r": 3})
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", "cat")
    config = model.peft_config["sum"]
    ranks = {site.path: site.rank for site in model.get_base_model()._veneer_overlay.resolutions["sum"].sites}
    assert sorted(set(ranks.values())) == [3, 4, 7]
    assert config.lora_alpha == config.r
    assert config.rank_pattern == config.alpha_pattern != {}
    assert not config.use_rslora


@pytest.mark.parametrize(("build", "targets"), [(gpt2, ["c_attn", "wte"]), (llama, ["embed_tokens", "lm_head"])])
@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties_svd"])
def test_other_kinds_of_layer_too(build, targets, kind, tmp_path):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": targets}
    theirs, ours = pair_of_peft(build(), fields, fields, tmp_path)
    quietly(theirs.add_weighted_adapter, ["one", "two"], WEIGHTS, "sum", **options(kind))
    ours.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", **options(kind))
    theirs.set_adapter("sum")
    ours.set_adapter("sum")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


class Patches(nn.Module):
    """Convolutions, plain and in groups, whose output is linear in each weight's update."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, **options)
        self.double()

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_convolutions_too(kind, tmp_path):
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["conv"]}
    theirs, ours = pair_of_peft(Patches(padding=1), fields, fields, tmp_path)
    quietly(theirs.add_weighted_adapter, ["one", "two"], WEIGHTS, "sum", kind)
    ours.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", kind)
    theirs.set_adapter("sum")
    ours.set_adapter("sum")
    x = torch.randn(2, 4, 5, 5).double()
    assert torch.allclose(logits(ours, x), logits(theirs, x), atol=1e-6)
    ours.save_pretrained(tmp_path / "sum", selected_adapters=["sum"])
    saved = read_by_peft(Patches(padding=1), tmp_path / "sum" / "sum")
    assert torch.allclose(logits(saved, x), logits(ours, x), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "fields", "kind"),
    [
        ({"groups": 2}, {}, {"combination_type": "cat"}),
        ({"groups": 2}, {}, {"svd_rank": 8}),
        ({"padding": 1, "dilation": 2}, {"use_dora": True}, {"svd_rank": 6}),
    ],
    ids=["groups cat", "groups svd", "dora svd"],
)
def test_a_convolution_s_outputs_are_summed(options, fields, kind):
    shape = {"r": 2, "lora_alpha": 3, "target_modules": ["conv"], **fields}
    model = pair(Patches(**options), shape, {**shape, "r": 4})
    x = torch.randn(2, 4, 7, 7).double()
    with model.disable_adapter():
        expected = plain = logits(model, x)
    for name, weight in zip(["one", "two"], WEIGHTS, strict=True):
        model.set_adapter(name)
        expected = expected + weight * (logits(model, x) - plain)
    quietly(model.add_weighted_adapter, ["one", "two"], WEIGHTS, "sum", **kind)
    model.set_adapter("sum")
    assert torch.allclose(logits(model, x), expected, atol=1e-5)


class TwoLayers(nn.Module):
    """A path that is the end of another, an embedding, and no library."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(7, 5)
        self.x = nn.Linear(5, 6)
        self.inner = nn.Sequential(nn.Linear(6, 4))
        self.inner.x = nn.Linear(4, 4)
        self.double()

    def forward(self, tokens):
        return self.inner(self.x(self.tokens(tokens)))


@st.composite
def adapters(draw):
    """A config for TwoLayers with any rank, scale and choice of layers."""
    targets = draw(st.lists(st.sampled_from(["tokens", "inner.0", "inner.x"]), unique=True, min_size=1))
    return LoraConfig(
        r=draw(st.integers(1, 4)),
        lora_alpha=draw(st.floats(0.1, 20)),
        use_rslora=draw(st.booleans()),
        target_modules=draw(st.sampled_from([targets, r"x|inner\.0", r"x|inner\.x"])),
        rank_pattern=draw(st.sampled_from([{}, {".*": 2}])),
        init_lora_weights=False,
    )


@settings(max_examples=1000, deadline=None)
@given(st.lists(adapters(), min_size=1, max_size=3), st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.booleans())
def test_cat_merges_to_the_weighted_sum_in_float64(configs, weights, by_svd):
    base = TwoLayers()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    names = [f"n{i}" for i in range(len(configs))]
    model = get_peft_model(base, configs[0], names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    weights = weights[: len(names)]
    expected = {}
    for path in ["tokens", "x", "inner.0", "inner.x"]:
        layer = base.get_submodule(path)
        mine = [(n, w) for n, w in zip(names, weights, strict=True) if n in getattr(layer, "adapters", {})]
        moved = delta(model, path, *(n for n, _ in mine), weights=[w for _, w in mine]) if mine else 0.0
        expected[path] = before[f"{path}.weight"] + moved
    kind = {"combination_type": "svd", "svd_rank": 7} if by_svd else {"combination_type": "cat"}
    quietly(
        model.add_weighted_adapter, names, weights, "sum", **kind
    )  # a rank above what a layer can have is warned of
    merge(base, ["sum"])
    for path, value in expected.items():
        assert torch.allclose(base.get_submodule(path)._parameters["weight"], value, atol=1e-11)


def test_rslora_and_a_changed_scale_count_as_they_are():
    model = pair(Stack().double(), {**STACK, "use_rslora": True}, {**STACK, "r": 3})
    adapter_on(model.get_base_model().first, "two").scale = 0.25
    expected = delta(model, "first", "one", "two", weights=WEIGHTS)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", "cat")
    assert torch.allclose(delta(model, "first", "sum"), expected)


STACK = {"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"]}


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_one_adapter_is_combined_as_asked(kind):
    model = pair(Stack().double(), STACK, STACK)
    expected = delta(model, "first", "one", weights=[-0.4])
    model.add_weighted_adapter(["one"], [-0.4], "sum", kind)
    assert torch.allclose(delta(model, "first", "sum"), expected)


def test_dora_is_taken_as_the_difference_it_makes():
    model = pair(Stack().double(), {**STACK, "use_dora": True}, STACK)
    expected = delta(model, "first", "one", "two", weights=WEIGHTS)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "full", svd_rank=16)
    assert torch.allclose(delta(model, "first", "full"), expected, atol=1e-6)  # W' - W passes through float32
    assert not model.peft_config["full"].use_dora
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "thin")
    assert model.peft_config["thin"].r == 2
    U, S, Vh = torch.linalg.svd(expected, full_matrices=False)
    assert torch.allclose(delta(model, "first", "thin"), (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-6)


def test_an_update_with_a_start_is_taken_whole(tmp_path):
    model = pair(Stack(), {**STACK, "init_lora_weights": "pissa"}, STACK)
    first = model.get_base_model().first
    before = first._parameters["weight"].clone()
    expected = delta(model, "first", "one", "two", weights=WEIGHTS)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", "cat")
    assert torch.allclose(delta(model, "first", "sum"), expected, atol=1e-6)
    assert adapter_on(first, "sum").lora_A.shape[0] == 6
    assert model.peft_config["sum"].init_lora_weights is True
    assert torch.equal(first._parameters["weight"], before)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.allclose(logits(read_by_peft(Stack(), tmp_path / "sum"), ids(20)), logits(model, ids(20)), atol=1e-5)


@pytest.mark.parametrize("active", ["one", "two"])
def test_a_base_that_another_adapter_replaces_is_not_the_base(active):
    model = pair(Stack(), {**STACK, "use_dora": True}, {**STACK, "init_lora_weights": "loftq"})
    model.set_adapter("one")
    expected = delta(model, "first", "one")
    model.set_adapter(active)
    model.add_weighted_adapter(["one"], [1.0], "sum", svd_rank=16)
    assert torch.allclose(delta(model, "first", "sum"), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="base weights of its own"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "other")


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_biases_of_adapters_are_summed(kind, tmp_path):
    linear = {"r": 2, "lora_alpha": 3, "target_modules": ["first"]}
    model = pair(Stack(), {**linear, "lora_bias": True}, {**linear, "target_modules": ["first", "second"]})
    first = model.get_base_model().first
    expected = 0.7 * 1.5 * adapter_on(first, "one").lora_bias
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", kind)
    assert torch.allclose(adapter_on(first, "sum").lora_bias, expected)
    assert not adapter_on(model.get_base_model().second, "sum").lora_bias.any()
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    x = ids(20)
    assert torch.allclose(logits(read_by_peft(Stack(), tmp_path / "sum"), x), logits(model, x), atol=1e-6)


def test_a_module_trained_in_full_is_taken_over(tmp_path):
    fields = {"r": 2, "target_modules": ["query"]}
    model = pair(bert(), {**fields, "modules_to_save": ["classifier"]}, {**fields, "target_modules": ["key"]})
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", "cat")
    copies = model.get_base_model().classifier.modules_to_save
    assert torch.equal(copies["sum"].weight, copies["one"].weight)
    assert copies["sum"].weight is not copies["one"].weight
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.allclose(logits(read_by_peft(bert(), tmp_path / "sum")), logits(model), atol=1e-6)


def test_the_new_one_waits_and_trains_like_the_first():
    model = pair(Stack(), STACK, STACK)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", "cat")
    assert model.active_adapters == ["one"]
    new = adapter_on(model.get_base_model().first, "sum")
    assert not new.lora_A.requires_grad
    model.set_adapter("sum")
    assert new.lora_A.requires_grad
    model.set_requires_grad("one", False)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "frozen", "cat")
    model.set_adapter("frozen")
    assert not adapter_on(model.get_base_model().first, "frozen").lora_A.requires_grad


def test_the_combination_owns_its_values():
    model = pair(Stack(), STACK, STACK)
    model.add_weighted_adapter(["one"], [1.0], "sum", "cat")
    before = delta(model, "first", "sum")
    with torch.no_grad():
        adapter_on(model.get_base_model().first, "one").lora_A.zero_()
    assert torch.equal(delta(model, "first", "sum"), before)


@pytest.mark.parametrize("kind", [name for name in COMBINATIONS if name.startswith("dare")])
def test_a_generator_decides_what_is_dropped(kind):
    model = pair(Stack(), STACK, STACK)
    chance = {"combination_type": kind, "density": 0.5}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generator = torch.Generator().manual_seed(seed)
        model.add_weighted_adapter(["one", "two"], WEIGHTS, name, **chance, generator=generator)
    assert torch.equal(delta(model, "first", "a"), delta(model, "first", "b"))
    assert not torch.equal(delta(model, "first", "a"), delta(model, "first", "c"))


@pytest.mark.parametrize("float32", [True, False])
def test_a_half_precision_base_keeps_the_dtype_of_the_adapters(float32):
    model = get_peft_model(llama(dtype=torch.bfloat16), LoraConfig(**ATTENTION), "one", autocast_adapter_dtype=float32)
    shake(model)
    model.add_weighted_adapter(["one"], [0.5], "sum")
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    assert adapter_on(q_proj, "sum").lora_A.dtype == (torch.float32 if float32 else torch.bfloat16)


def test_a_path_that_ends_another_keeps_its_own_rank():
    model = pair(TwoLayers(), {"r": 2, "target_modules": r"x|inner\.x"}, {"r": 3, "target_modules": r"x"})
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", "cat")
    base = model.get_base_model()
    assert [adapter_on(layer, "sum").lora_A.shape[0] for layer in (base.x, base.inner.x)] == [5, 2]
    model.add_weighted_adapter(["two"], [1.0], "alone", "cat")
    assert "adapters" in dict(base.x.named_children())
    assert "alone" in base.x.adapters
    assert "alone" not in base.inner.x.adapters


REFUSED = {
    "unknown adapter": (["one", "tow"], WEIGHTS, {}, AdapterNameError, "did you mean 'two'"),
    "named twice": (["one", "one"], WEIGHTS, {}, AdapterNameError, "named twice"),
    "too few weights": (["one", "two"], [1.0], {}, ConfigError, "give each adapter one"),
    "no adapters": ([], [], {}, ConfigError, "none are given"),
    "a string": ("one", [1.0], {}, ConfigError, "must be a list"),
    "one weight": (["one", "two"], 1.0, {}, ConfigError, "must be a list"),
    "nan": (["one", "two"], [1.0, float("nan")], {}, ConfigError, "finite"),
    "type": (["one", "two"], WEIGHTS, {"combination_type": "sdv"}, ConfigError, "did you mean 'svd'"),
    "density": (["one", "two"], WEIGHTS, {"combination_type": "ties"}, ConfigError, "density: ties needs it"),
    "rank": (["one", "two"], WEIGHTS, {"svd_rank": 10**8}, ConfigError, "from 1 to 65,536"),
    "ranks differ": (["one", "three"], WEIGHTS, {"combination_type": "linear"}, ConfigError, "second: .*one has 2"),
    "driver": (["one", "two"], WEIGHTS, {"svd_driver": "gesvd"}, ConfigError, "CUDA only"),
    "dora": (["one", "dora"], WEIGHTS, {"combination_type": "cat"}, ConfigError, "choose svd"),
    "bias": (["one", "bias"], WEIGHTS, {}, ConfigError, "trains biases of the base"),
    "lora_bias": (
        ["one", "lora_bias"],
        WEIGHTS,
        {"combination_type": "ties", "density": 0.5},
        ConfigError,
        "choose svd, linear or cat",
    ),
    "heads": (["head", "head2"], WEIGHTS, {}, ConfigError, "head and head2 each train head in full"),
    "infinite": (
        ["one", "broken"],
        WEIGHTS,
        {},
        ConfigError,
        "first: adapter broken: A has values that are not finite",
    ),
}


@pytest.fixture(scope="module")
def crowded():
    model = pair(Stack(), STACK, STACK)
    others = {
        "three": {"r": 3},
        "dora": {"use_dora": True},
        "bias": {"bias": "lora_only"},
        "lora_bias": {"lora_bias": True},
        "head": {"modules_to_save": ["head"]},
        "head2": {"modules_to_save": ["head"]},
        "broken": {},
    }
    for name, fields in others.items():
        model.add_adapter(name, LoraConfig(**{**STACK, **fields}))
    adapter_on(model.get_base_model().first, "broken").lora_A.data.fill_(float("inf"))
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_a_combination_that_cannot_be_is_refused_and_nothing_changes(crowded, case):
    names, weights, fields, error, words = REFUSED[case]
    before = {name: (value, value.clone()) for name, value in crowded.state_dict().items()}
    configs = list(crowded.peft_config)
    with pytest.raises(error, match=words):
        crowded.add_weighted_adapter(names, weights, "sum", **fields)
    after = crowded.state_dict()
    assert list(crowded.peft_config) == configs
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], copied) for name, (_, copied) in before.items())


@pytest.mark.parametrize("name", ["two", "a.b", "../up"])
def test_a_taken_or_impossible_name_is_refused(crowded, name):
    with pytest.raises(AdapterNameError):
        crowded.add_weighted_adapter(["one"], [1.0], name)


def test_not_while_something_is_merged():
    model = pair(Stack(), STACK, STACK)
    model.merge_adapter(["one"])
    with pytest.raises(MergeError, match="Unmerge one first"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum")


@pytest.mark.parametrize(
    "field", ["target_parameters", "trainable_token_indices", "alora_invocation_tokens", "layer_replication"]
)
def test_an_adapter_that_is_more_than_updates_is_refused(field):
    model = pair(Stack(), STACK, STACK)
    object.__setattr__(model.peft_config["two"], field, ["anything"])
    with pytest.raises(VeneerError, match=rf"adapter two: .*\({field}\)"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum")


def test_a_rank_above_what_a_layer_can_have_is_warned_of():
    model = pair(Stack(), {**STACK, "r": 12}, {**STACK, "r": 12})
    with pytest.warns(VeneerWarning, match="get a rank above"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", "cat")


def test_task_and_dropout_are_the_first_adapter_s():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.3))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both", combination_type="linear")
    found = model.peft_config["both"]
    assert (found.task_type, found.lora_dropout) == ("CAUSAL_LM", 0.3)

"""Fused experts here and in PEFT: outputs, gradients, merged weights, files both ways."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import tiny
import tiny_moe
import veneer
from parity import oracle
from veneer.errors import AttachError, TargetError
from veneer.init import Weight, initialise
from veneer.layers.attach import adapter_on
from veneer.model.start import joined, split
from veneer.model.tensors import adapter_tensors, stack_sizes, tensors_from_state

TIGHT = {"rtol": 1e-4, "atol": 1e-5}
BOTH = tiny_moe.BOTH
FAMILIES = {
    "mixtral": tiny_moe.mixtral,
    "qwen2": tiny_moe.qwen2_moe,
    "qwen3": tiny_moe.qwen3_moe,
    "gpt-oss": tiny_moe.gpt_oss,
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((family, "both", {"target_parameters": BOTH}) for family in FAMILIES),
    ("llama4", "both", {"target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]}),
    ("mixtral", "one", {"target_parameters": ["experts.down_proj"]}),
    ("mixtral", "other", {"target_parameters": BOTH[:1], "use_rslora": True}),
    ("mixtral", "router", {"target_parameters": ["mlp.gate.weight", *BOTH], "target_modules": ["q_proj", "v_proj"]}),
    (
        "qwen3",
        "patterns",
        {
            "target_parameters": BOTH,
            "target_modules": ["o_proj"],
            "rank_pattern": {"experts.down_proj": 3, "layers.0.*": 1},
            "alpha_pattern": {"gate_up_proj": 12},
        },
    ),
    ("gpt-oss", "full-names", {"target_parameters": ["model.layers.1.mlp.experts.down_proj", "experts.gate_up_proj"]}),
    ("qwen2", "gaussian", {"target_parameters": BOTH, "init_lora_weights": "gaussian"}),
    ("qwen2", "saved", {"target_parameters": BOTH, "modules_to_save": ["lm_head"]}),
]
case = pytest.mark.parametrize(
    ("family", "fields"),
    [pytest.param(family, {"target_modules": [], **fields}, id=f"{family}-{name}") for family, name, fields in CASES],
)


def base_of(family: str) -> Any:
    return {**FAMILIES, "llama4": tiny_moe.llama4}[family]()


def run(model: Any) -> torch.Tensor:
    return model(input_ids=tiny.ids()).logits


def made_alike(family: str, fields: dict[str, Any], tmp_path: Any) -> tuple[Any, Any, Any]:
    base = base_of(family)
    theirs = tiny.shake(oracle.made_by_peft(base, **{"r": 2, "lora_alpha": 6, **fields})).eval()
    folder = oracle.save(theirs, tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    return base, theirs, ours


@case
def test_outputs_gradients_and_merged_weights_are_equal(family, fields, tmp_path):
    base, theirs, ours = made_alike(family, fields, tmp_path)
    expected = run(theirs)
    assert not torch.allclose(expected, run(base), atol=1e-3), "the adapter does nothing: a void test"
    assert_close(run(ours), expected, **TIGHT)
    for model in (theirs, ours):
        run(model).square().mean().backward()
    bare = ours.get_base_model()
    by_storage = {p.data_ptr(): p.grad for p in bare.parameters() if p.requires_grad}
    found = {key: by_storage[value.data_ptr()] for key, value in adapter_tensors(bare, "default").items()}
    gradients = oracle.gradients(theirs)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert_close(found[key], gradient, **TIGHT, msg=lambda text, key=key: f"{key}: {text}")
    merged = ours.merge_and_unload().state_dict()
    assert list(merged) == list(base.state_dict())
    for name, value in oracle.quietly(theirs.merge_and_unload).state_dict().items():
        assert_close(merged[name], value, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@case
def test_what_we_write_peft_reads(family, fields, tmp_path):
    base, theirs, ours = made_alike(family, fields, tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    read = oracle.read_by_peft(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert_close(run(read), run(theirs), **TIGHT)
    expected, found = oracle.values(theirs), oracle.values(read)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@case
def test_a_new_adapter_has_the_same_tensors_as_pefts(family, fields):
    base = base_of(family)
    theirs = oracle.made_by_peft(base, **{"r": 2, **fields})
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**{"r": 2, **fields}))
    expected = {key: tuple(value.shape) for key, value in oracle.values(theirs).items()}
    found = {key: tuple(v.shape) for key, v in adapter_tensors(ours.get_base_model(), "default").items()}
    assert found == expected
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    preview = veneer.targets.preview(base, veneer.LoraConfig(**{"r": 2, **fields}))
    assert preview.trainable == theirs.get_nb_trainable_parameters()[0]
    assert torch.equal(run(ours), run(base)), "a new adapter starts as the base"


def adapted(**changes: Any) -> tuple[Any, Any]:
    base = tiny_moe.mixtral()
    fields = {"r": 2, "target_modules": ["q_proj"], "target_parameters": BOTH, **changes}
    return base, tiny.shake(veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**fields))).eval()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_every_way_of_computing_experts_sees_the_adapters(implementation):
    base, model = adapted()
    expected = copy.deepcopy(model).merge_and_unload()
    for one in (base, model.get_base_model(), expected):
        one.config._experts_implementation = implementation
    assert_close(run(model), run(expected), **TIGHT)
    assert not torch.allclose(run(model), run(base), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model), run(base))


@torch.no_grad()
def test_merging_and_unmerging_are_exact():
    base, model = adapted(use_dora=True)
    before = run(model)
    model.merge_adapter()
    assert_close(run(model), before, **TIGHT)
    model.unmerge_adapter()
    assert torch.equal(run(model), before)
    state = model.get_base_model().state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
    bare = model.unload()
    assert list(bare.state_dict()) == list(base.state_dict())
    assert {type(module) for module in bare.modules()} == {type(module) for module in base.modules()}


def test_dora_which_peft_refuses_is_saved_and_loaded(tmp_path):
    base, model = adapted(use_dora=True)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        assert torch.equal(run(again), run(model))


def test_adapters_on_different_parameters_live_side_by_side(tmp_path):
    base, model = adapted(target_parameters=BOTH)
    model.add_adapter("other", veneer.LoraConfig(r=3, target_parameters=BOTH[1:]))
    tiny.shake(model)
    model.set_adapter("other")
    tiny.shake(model, seed=9)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = run(model)
        read = oracle.read_by_peft(base, tmp_path / "other").eval()
        assert_close(run(read), expected, **TIGHT)
        first = oracle.read_by_peft(base, tmp_path).eval()
        model.set_adapter("default")
        assert_close(run(model), run(first), **TIGHT)
    model.set_adapter("other")
    model.delete_adapter("default")
    with torch.no_grad():
        assert_close(run(model), expected)


def test_a_file_without_target_modules_means_none(tmp_path):
    """PEFT leaves the field empty for an architecture that it does not know."""
    base, x = tiny_moe.Block(), torch.randn(3, 4)
    theirs = tiny.shake(oracle.made_by_peft(base, r=2, target_parameters=["experts.up", "experts.table"])).eval()
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), oracle.save(theirs, tmp_path))
    assert_close(ours(x), theirs(x))
    assert [site.name for site in ours.get_base_model()._veneer_overlay.resolutions["default"].sites] == [
        "experts.up",
        "experts.table",
    ]
    assert ours.peft_config["default"].target_modules == []


def test_a_file_that_adapts_a_layers_weight_as_a_parameter(tmp_path):
    """Which PEFT allows; here it is read, but not made anew, and not laid over an adapter on the layer's output."""
    base, x = tiny_moe.Block(), torch.randn(3, 4)
    fields = {"r": 2, "target_modules": ["last"], "target_parameters": ["first.weight"]}
    theirs = tiny.shake(oracle.made_by_peft(base, **fields)).eval()
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), oracle.save(theirs, tmp_path))
    assert_close(ours(x), theirs(x))
    with pytest.raises(TargetError, match=r"write target_modules=\['first'\]"):
        veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**fields))
    other = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(AttachError, match="another adapter adapts first by its output"):
        other.load_adapter(tmp_path, "second")


def test_the_base_checkpoint_stays_clean(tmp_path):
    base, model = adapted()
    model.get_base_model().save_pretrained(tmp_path / "ours")
    base.save_pretrained(tmp_path / "base")
    again = type(base).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in base.state_dict().items())
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("ours", "base")]
    assert names[0] == names[1]


def test_values_come_out_of_a_state_dict_too():
    _, model = adapted()
    state, bare = model.state_dict(), model.get_base_model()
    found, expected = tensors_from_state(bare, "default", state), adapter_tensors(bare, "default")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert "base_model.model.model.layers.0.mlp.experts.adapters.default.gate_up_proj.lora_A" in state


def test_gradient_checkpointing_changes_nothing():
    _, model = adapted()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for one in (model, twin):
        one.train()
        run(one).square().mean().backward()
        experts = one.get_base_model().model.layers[0].mlp.experts
        gradients.append([p.grad for p in experts.adapters.parameters()])
    assert len(gradients[0]) == 4
    for expected, found in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert_close(found, expected)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_each_expert_starts_as_a_layer_of_its_own_would(init):
    config = veneer.LoraConfig(r=4, target_parameters=["gate_up_proj"], init_lora_weights=init)
    base = tiny_moe.mixtral()
    torch.manual_seed(3)
    model = veneer.get_peft_model(base, config)
    torch.manual_seed(3)
    for layer in model.get_base_model().model.layers:
        adapter, W = adapter_on(layer.mlp.experts, "default", "gate_up_proj"), layer.mlp.experts.gate_up_proj
        for e in range(4):
            alone = initialise("kaiming" if init is True else init, Weight.of(W[e].detach()), 4)
            assert torch.equal(adapter.lora_A[4 * e : 4 * e + 4], alone.A)
            assert torch.equal(adapter.lora_B[:, e::4], alone.B)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "orthogonal", "mica"])
def test_every_initialisation_starts_each_expert(init, tmp_path):
    base = tiny_moe.mixtral()
    fields = {"r": 2, "lora_alpha": 6, "target_parameters": BOTH, "init_lora_weights": init}
    model = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**fields)).eval()
    experts = model.get_base_model().model.layers[0].mlp.experts
    adapter, W = adapter_on(experts, "default", "gate_up_proj"), base.model.layers[0].mlp.experts.gate_up_proj
    for e in range(4):
        made = initialise(init, Weight.of(W[e].detach()), 2, scale=3)
        if init != "orthogonal":  # which is random
            assert_close(adapter.lora_A[2 * e : 2 * e + 2], made.A)
            assert_close(adapter.lora_B[:, e::4], made.B)
        if made.base is not None:
            assert_close(experts._parameters["gate_up_proj"][e], made.base)
    if init != "loftq":
        assert_close(run(model), run(base), **TIGHT)
    tiny.shake(model)
    model.save_pretrained(tmp_path)
    if init in ("pissa", "olora"):  # PEFT cannot read a file that names one of the others for a parameter
        assert_close(run(oracle.read_by_peft(base, tmp_path).eval()), run(model), **TIGHT)
    assert_close(run(veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), run(model), **TIGHT)


def test_a_start_is_found_again_in_a_file(tmp_path):
    base = tiny_moe.mixtral()
    config = veneer.LoraConfig(r=2, target_parameters=BOTH, init_lora_weights="pissa")
    model = tiny.shake(veneer.get_peft_model(copy.deepcopy(base), config)).eval()
    bare = model.get_base_model()
    values, stacked = adapter_tensors(bare, "default"), stack_sizes(bare._veneer_overlay.resolutions["default"])
    assert set(stacked.values()) == {4}
    file = joined(values, stacked)
    again = split(file, set(file), stacked)
    assert again.keys() == values.keys()
    assert all(torch.equal(again[key], value) for key, value in values.items())


def test_a_single_transposed_expert(tmp_path):
    """One matrix stored as (1, in, out), where PEFT's update has the wrong shape: judged by the plain formula."""
    block = tiny_moe.Block(experts=1, transposed=True).double()
    model = tiny.shake(veneer.get_peft_model(copy.deepcopy(block), veneer.LoraConfig(r=2, target_parameters=["up"])))
    model.double()
    adapter = adapter_on(model.get_base_model().experts, "default", "up")
    with torch.no_grad():
        block.experts.up += (adapter.scale * adapter.lora_B @ adapter.lora_A).T
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_close(model(x), block(x))

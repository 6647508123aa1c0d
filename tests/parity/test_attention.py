"""`torch.nn.MultiheadAttention` here and in PEFT, which applies the update of out_proj twice: the judge is the plain
formula, W + s·BA in each of the two weights, in float64.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.errors import VeneerError
from veneer.layers.attach import adapter_on
from veneer.model.tensors import adapter_tensors

WIDTH, HEADS = 8, 2


class Tower(nn.Module):
    """A small vision tower in the manner of CLIP: norm, attention, norm, two linear layers, twice."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH),
                    "attn": nn.MultiheadAttention(WIDTH, HEADS, **attention),
                    "c_fc": nn.Linear(WIDTH, 12),
                    "c_proj": nn.Linear(12, WIDTH),
                }
            )
            for _ in range(2)
        )
        self.double()

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for block in self.blocks:
            z = block["norm"](x)
            x = x + block["attn"](z, z, z, **kwargs)[0]
            x = x + block["c_proj"](torch.relu(block["c_fc"](x)))
        return x


def inputs(rows: int = 3, tokens: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, tokens, WIDTH, dtype=torch.float64, generator=generator)


FIELDS: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["attn", "c_fc"]}


def adapted(base: nn.Module, **changes: Any) -> Any:
    model = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**{**FIELDS, **changes}))
    return tiny.shake(model).eval()


def by_formula(base: nn.Module, tensors: dict[str, torch.Tensor], scale: float = 3) -> Any:
    """The base with s·BA in each weight that the tensors of a file adapt."""
    plain = copy.deepcopy(base)
    prefix = "base_model.model."
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            path = key.removeprefix(prefix).removesuffix(".lora_A.weight").replace(".base_layer", "")
            module = plain.get_submodule(path)
            weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
            weight += scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return plain


@pytest.mark.parametrize("attention", [{}, {"bias": False}, {"batch_first": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("training", [False, True])
def test_the_output_is_that_of_the_plain_formula(attention, training):
    base = Tower(**attention)
    model = adapted(base).train(training)
    plain = by_formula(base, adapter_tensors(model.get_base_model(), "default")).train(training)
    x = inputs()
    assert_close(model(x), plain(x))
    with torch.no_grad():  # the fused operator, where torch takes it
        assert_close(model(x), plain(x))
        assert not torch.allclose(model(x), base(x), atol=1e-3)


def test_masks_weights_and_shapes_go_through():
    base = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).double()
    model = adapted(base, target_modules=["0"])
    plain = by_formula(base, adapter_tensors(model.get_base_model(), "default"))[0]
    ours = model.get_base_model()[0]
    x, other = inputs(), inputs(tokens=6)
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[0, 2:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    for args, kwargs in [
        ((x, x, x), {"need_weights": True, "average_attn_weights": False}),
        ((x, x, x), {"need_weights": False}),
        ((x, x, x), {"key_padding_mask": padding}),
        ((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        ((x, other, other), {}),
        ((x[0], x[0], x[0]), {}),
    ]:
        for found, expected in zip(ours(*args, **kwargs), plain(*args, **kwargs), strict=True):
            assert_close(found, expected)


def test_gradients_are_those_of_the_plain_formula():
    base = Tower()
    model = adapted(base, target_modules=["attn"])
    model(inputs()).square().sum().backward()
    values = {
        key: value.clone().requires_grad_() for key, value in adapter_tensors(model.get_base_model(), "default").items()
    }
    weights = {}
    for i in range(2):
        for name, path in (("in_proj_weight", ""), ("out_proj.weight", "base_layer.out_proj.")):
            prefix = f"base_model.model.blocks.{i}.attn.{path}"
            delta = 3 * values[f"{prefix}lora_B.weight"] @ values[f"{prefix}lora_A.weight"]
            weights[f"blocks.{i}.attn.{name}"] = base.get_parameter(f"blocks.{i}.attn.{name}").detach() + delta
    torch.func.functional_call(base, weights, inputs()).square().sum().backward()
    by_storage = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    for key, value in adapter_tensors(model.get_base_model(), "default").items():
        assert_close(by_storage[value.data_ptr()], values[key].grad, msg=lambda text, key=key: f"{key}: {text}")


def test_files_go_both_ways(tmp_path):
    base = Tower()
    theirs = tiny.shake(oracle.made_by_peft(base, **FIELDS)).eval()
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), oracle.save(theirs, tmp_path / "theirs"))
    expected = oracle.values(theirs)
    assert {f"base_model.model.blocks.0.attn.base_layer.out_proj.lora_{X}.weight" for X in "AB"} <= expected.keys()
    found = adapter_tensors(ours.get_base_model(), "default")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert_close(ours(inputs()), by_formula(base, expected)(inputs()))
    ours.save_pretrained(tmp_path / "ours")
    read = oracle.read_by_peft(base, tmp_path / "ours").eval()
    assert all(torch.equal(oracle.values(read)[key], value) for key, value in expected.items())
    assert_close(read(inputs()), theirs(inputs()))


def test_where_peft_is_right_we_agree(tmp_path):
    """With the update of out_proj at zero only the input projection counts."""
    base = Tower()
    theirs = tiny.shake(oracle.made_by_peft(base, **FIELDS)).eval()
    for name, parameter in theirs.named_parameters():
        if "out_proj.lora_B" in name:
            parameter.data.zero_()
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), oracle.save(theirs, tmp_path), is_trainable=True)
    assert_close(ours.eval()(inputs()), theirs(inputs()))
    for model in (theirs, ours):
        model(inputs()).square().sum().backward()
    by_storage = {p.data_ptr(): p.grad for p in ours.parameters() if p.requires_grad}
    found = {k: by_storage[v.data_ptr()] for k, v in adapter_tensors(ours.get_base_model(), "default").items()}
    for key, gradient in oracle.gradients(theirs).items():
        if "out_proj" not in key:
            assert_close(found[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


def test_a_new_adapter_has_the_same_tensors_as_pefts():
    base = Tower()
    theirs, ours = oracle.made_by_peft(base, **FIELDS), veneer.get_peft_model(base, veneer.LoraConfig(**FIELDS))
    found = {key: value.shape for key, value in adapter_tensors(ours.get_base_model(), "default").items()}
    assert found == {key: value.shape for key, value in oracle.values(theirs).items()}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": "all-linear"}])
def test_merging_is_exact_both_ways(fields):
    base = Tower()
    model = adapted(base, **fields)
    before = model(inputs())
    model.merge_adapter()
    assert_close(model(inputs()), before)
    model.unmerge_adapter()
    assert torch.equal(model(inputs()), before)
    state = model.get_base_model().state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
    merged = model.merge_and_unload()
    assert_close(merged(inputs()), before)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert type(merged.blocks[0]["attn"]) is nn.MultiheadAttention
    assert type(merged.blocks[0]["attn"].out_proj) is type(base.blocks[0]["attn"].out_proj)


def test_dora_scales_the_rows_of_all_three_projections():
    base = Tower()
    model = adapted(base, target_modules=["attn"], use_dora=True)
    attention = model.get_base_model().blocks[1]["attn"]
    adapter = adapter_on(attention, "default", "in_proj_weight")
    updated = base.blocks[1]["attn"].in_proj_weight + 3 * adapter.lora_B @ adapter.lora_A
    assert adapter.lora_magnitude_vector.shape == (3 * WIDTH,)
    expected = adapter.lora_magnitude_vector.unsqueeze(1) * updated / updated.norm(dim=1, keepdim=True)
    assert_close(attention._effective()["in_proj_weight"], expected)


def test_the_input_projection_alone(tmp_path):
    base = Tower()
    fields = {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": ["attn.in_proj_weight"]}
    theirs = tiny.shake(oracle.made_by_peft(base, **fields)).eval()
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), oracle.save(theirs, tmp_path))
    assert_close(ours(inputs()), theirs(inputs()))


def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    model = adapted(Tower()).get_base_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(inputs()), model(inputs()))
    torch._dynamo.reset()


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_that_would_fuse_its_layers(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).double().eval()
    model = adapted(base, target_modules=["self_attn", "linear2"])
    plain = by_formula(base, adapter_tensors(model.get_base_model(), "default"))
    mask = None
    if padded:
        mask = torch.zeros(3, 4, dtype=torch.bool)
        mask[0, 3:] = True
    with torch.no_grad():  # in training, but without dropout, torch calls every part
        found, expected, unadapted = (
            one(inputs(), src_key_padding_mask=mask)[:, :3] for one in (model, plain.train(), base.train())
        )
        assert_close(found, expected)
        assert not torch.allclose(found, unadapted, atol=1e-3)
    bare = model.unload()
    assert type(bare) is nn.TransformerEncoder
    assert type(bare.layers[0]) is nn.TransformerEncoderLayer


def test_a_copy_of_an_adapted_tower_stands_alone():
    model = adapted(Tower())
    twin = copy.deepcopy(model)
    for parameter in twin.get_base_model().blocks[0]["attn"].adapters.parameters():
        parameter.data.zero_()
    assert not torch.allclose(twin(inputs()), model(inputs()), atol=1e-3)


def test_rows_invocations_and_combinations_are_refused_before_anything_runs():
    model = adapted(Tower(), target_modules=["attn"])
    model.add_adapter("other", veneer.LoraConfig(**{**FIELDS, "target_modules": ["attn"]}))
    with pytest.raises(VeneerError, match=r"in_proj_weight, which is read as one weight for all rows"):
        model(inputs(), adapter_names=["default", "other", "default"])
    with pytest.raises(VeneerError, match=r"attn\.out_proj, which is read"):
        model(inputs(), adapter_names=["default", "other", "default"])
    with pytest.raises(VeneerError, match="alora_invocation_tokens"):
        adapted(Tower(), alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    with pytest.raises(VeneerError, match="in_proj_weight"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum", combination_type="linear")

"""Convolutions: every way a kernel can move, groups, dropout, starts, and what is refused."""

import copy
import math
from collections import OrderedDict

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers import MambaConfig, MambaModel

import veneer
from parity.oracle import quietly
from tiny import shake
from veneer.errors import AttachError, ConfigError, MergeError, TargetError
from veneer.layers.part import parts_of

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
WAYS = {
    "plain": {"kernel_size": 3},
    "point": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": 2, "padding": "same", "dilation": 3},
    "valid": {"kernel_size": 3, "padding": "valid", "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    "replicate": {"kernel_size": 2, "padding": "same", "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "dilation": 2, "bias": False},
}
way = pytest.mark.parametrize("way", list(WAYS))
dimensions = pytest.mark.parametrize("dimensions", list(CONVS))


def adapted(layer, **fields):
    """(the bare layer, the model with a shaken adapter on it, the adapter)"""
    model = nn.Sequential(layer)
    config = veneer.LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": ["0"], **fields})
    ours = shake(veneer.get_peft_model(copy.deepcopy(model), config)).eval()
    return layer, ours, ours.get_base_model()[0].adapters["default"]


def dense(layer):
    """The weight of a grouped convolution as that of one without groups."""
    W = layer.weight.detach()
    rows, columns = W.shape[0] // layer.groups, W.shape[1]
    whole = W.new_zeros(W.shape[0], layer.in_channels, *W.shape[2:])
    for g in range(layer.groups):
        whole[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = W[g * rows : (g + 1) * rows]
    return whole


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@way
@dimensions
@pytest.mark.parametrize("dora", [False, True])
def test_the_output_is_that_of_the_plain_formula(way, dimensions, dora):
    torch.manual_seed(0)
    layer = CONVS[dimensions](4, 5, **WAYS[way]).double()
    bare, ours, adapter = adapted(layer, use_dora=dora)
    x = torch.randn(2, 4, *range(6, 6 + dimensions), dtype=torch.float64)
    delta = 0.75 * (adapter.lora_B.flatten(1) @ adapter.lora_A.flatten(1)).reshape(layer.weight.shape)
    W = bare.weight + delta
    if dora:
        W = W * (adapter.lora_magnitude_vector / W.flatten(1).norm(dim=1)).reshape(-1, *(1,) * (dimensions + 1))
    with torch.no_grad():
        for rows in (x, x[0]):
            assert_close(ours(rows), functional_call(bare, {"weight": W}, rows), rtol=1e-11, atol=1e-11)
        expected = ours(x)
        assert_close(ours.merge_and_unload()(x), expected, rtol=1e-10, atol=1e-10)


@dimensions
@pytest.mark.parametrize("groups", [2, 4])
def test_with_groups_the_update_sees_all_channels(dimensions, groups):
    torch.manual_seed(0)
    layer = CONVS[dimensions](4, 8, 2, groups=groups, padding="same", padding_mode="circular").double()
    bare, ours, adapter = adapted(layer, lora_bias=True)
    x = torch.randn(2, 4, *range(4, 4 + dimensions), dtype=torch.float64)
    whole = CONVS[dimensions](4, 8, 2, padding="same", padding_mode="circular").double()
    A, B = adapter.lora_A, adapter.lora_B
    assert B.shape == (8, 4 // groups, *(1,) * dimensions)
    parts = [
        B[g * 8 // groups : (g + 1) * 8 // groups].flatten(1) @ A[g * 4 // groups : (g + 1) * 4 // groups].flatten(1)
        for g in range(groups)
    ]
    values = {
        "weight": dense(bare) + 0.75 * torch.cat(parts).reshape(8, 4, *(2,) * dimensions),
        "bias": bare.bias + 0.75 * adapter.lora_bias,
    }
    expected = functional_call(whole, values, x)
    assert_close(ours(x), expected)
    found = torch.autograd.grad(ours(x).square().sum(), [A, B])
    for mine, true in zip(found, torch.autograd.grad(expected.square().sum(), [A, B]), strict=True):
        assert_close(mine, true)


def test_an_adapter_with_groups_cannot_be_merged():
    _, ours, _ = adapted(nn.Conv2d(4, 8, 3, groups=2))
    before = copy.deepcopy(ours.state_dict())
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(MergeError, match="0 has groups=2: each output sees the inputs of its group"):
            merge()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "fields", "error", "text"),
    [
        (nn.Conv1d(6, 6, 3, groups=3), {}, AttachError, "groups=3 must divide its rank, and 4 is no multiple of it"),
        (nn.Conv2d(4, 8, 3, groups=2), {"use_dora": True}, AttachError, "with groups=2 the update reaches across"),
        (nn.LazyConv2d(8, 3), {}, TargetError, "its size is not known before its first call"),
        (nn.ConvTranspose2d(4, 8, 3), {}, TargetError, "ConvTranspose2d is not a kind of layer that can be adapted"),
    ],
)
def test_what_is_refused(layer, fields, error, text):
    with pytest.raises(error, match=text):
        adapted(layer, **fields)
    assert not hasattr(layer, "adapters")


def test_a_convolution_that_computes_something_else_is_refused():
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
    from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding

    class Causal(nn.Conv1d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(F.pad(x, (2, 0)), weight, bias)

    for layer in (WeightStandardizedConv2d(3, 4, 3), Conv2dSamePadding(3, 4, 3), Causal(3, 4, 3)):
        with pytest.raises(TargetError, match=f"{type(layer).__name__} computes more than a convolution"):
            adapted(layer)


def test_a_subclass_that_only_sets_its_sizes_is_a_convolution():
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d

    _, ours, adapter = adapted(EfficientNetDepthwiseConv2d(4, kernel_size=3))
    assert adapter.lora_B.shape == (4, 1, 1, 1)
    assert ours(torch.randn(1, 4, 5, 5)).shape == (1, 4, 3, 3)


def test_a_lazy_convolution_is_adapted_after_its_first_call():
    layer = nn.LazyConv1d(8, 3)
    layer(torch.randn(1, 4, 9))
    assert adapted(layer)[2].lora_A.shape == (4, 4, 3)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_that_of_the_plain_formula(dora):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect", stride=2).double()
    bare, ours, adapter = adapted(layer, lora_dropout=0.5, use_dora=dora)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    ours.train()
    torch.manual_seed(4)
    found = ours(x)
    torch.manual_seed(4)
    kept = F.dropout(x, 0.5)
    delta = 0.75 * (adapter.lora_B.flatten(1) @ adapter.lora_A.flatten(1)).reshape(layer.weight.shape)

    def plain(W):
        return functional_call(bare, {"weight": W, "bias": torch.zeros(5, dtype=torch.float64)}, kept)

    if dora:
        gain = (adapter.lora_magnitude_vector / (bare.weight + delta).flatten(1).norm(dim=1)).reshape(-1, 1, 1)
        expected = bare(x) + (gain - 1) * plain(bare.weight) + gain * plain(delta)
    else:
        expected = bare(x) + plain(delta)
    assert_close(found, expected)


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_new_adapter_is_drawn_as_pefts(start, groups):
    """The same spread and the same largest value, up to chance, and the same zeros."""
    layer, fields = nn.Conv2d(8, 64, 5, groups=groups), {"r": 32, "init_lora_weights": start, "target_modules": ["0"]}
    torch.manual_seed(0)
    theirs = quietly(peft.get_peft_model, nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(**fields))
    ours = veneer.get_peft_model(nn.Sequential(layer), veneer.LoraConfig(**fields))
    expected = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    adapter = ours.get_base_model()[0].adapters["default"]
    for name, value in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
        true = next(p for key, p in expected.items() if name in key)
        assert value.shape == true.shape
        assert value.std().item() == pytest.approx(true.std().item(), rel=0.1)
        if start != "gaussian":
            assert value.abs().max().item() == pytest.approx(true.abs().max().item(), rel=0.02)
    bound = 1 / math.sqrt(8 * 25)
    assert start == "gaussian" or adapter.lora_A.abs().max() <= bound


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "mica"])
def test_starts_that_need_a_matrix(start):
    """A convolution is one on the patches of its input, unless it has groups."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"), torch.randn(2, 4, 5, 6)
    config = veneer.LoraConfig(r=4, target_modules=["0"], init_lora_weights=start)
    before = layer(x)
    ours = veneer.get_peft_model(nn.Sequential(layer), config).eval()
    with torch.no_grad():
        assert_close(ours(x), before)
        expected = shake(ours)(x)
        assert not torch.allclose(expected, before, atol=0.1)
        assert_close(ours.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="0: .*that of a convolution with groups=2 is none"):
        veneer.get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_over_a_half_precision_base(dtype, dora):
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 5, 3, padding=1).to(dtype)
    bare, ours, adapter = adapted(layer, use_dora=dora)
    x = torch.randn(2, 3, 9, dtype=dtype)
    y = ours(x)
    assert y.dtype == dtype
    assert adapter.lora_A.dtype == torch.float32
    exact = copy.deepcopy(ours).double()
    assert_close(y.double(), exact(x.double()), rtol=0.02, atol=0.05)


def test_rows_of_one_batch_with_adapters_of_their_own():
    layer, ours, _ = adapted(nn.Conv2d(4, 6, 3, groups=2))
    ours.add_adapter("two", veneer.LoraConfig(r=2, target_modules=["0"]))
    ours.set_adapter("two")
    shake(ours, seed=5)
    x, route = torch.randn(3, 4, 5, 5), ours.get_base_model()[0]._veneer_route
    alone = {None: layer(x), "two": ours(x)}
    ours.set_adapter("default")
    alone["default"] = ours(x)
    names = ["two", None, "default"]
    with route.serving(parts_of(names)):
        mixed = ours(x)
    for row, name in enumerate(names):
        assert_close(mixed[row], alone[name][row])
    assert not torch.allclose(alone["two"], alone["default"])


def test_all_linear_leaves_convolutions_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    ours = veneer.get_peft_model(model, veneer.LoraConfig(r=2, target_modules="all-linear"))
    assert not hasattr(ours.get_base_model()[0], "adapters")
    assert hasattr(ours.get_base_model()[2], "adapters")


def test_weight_norm_over_a_convolution():
    """Plain LoRA lies over a weight that is computed from others (wav2vec 2.0's positions)."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, groups=2).double())
    model = nn.Sequential(OrderedDict(conv=layer))
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    before = model(x)
    ours = shake(veneer.get_peft_model(model, veneer.LoraConfig(r=2, target_modules=["conv"])))
    adapter = ours.get_base_model().conv.adapters["default"]
    u = F.conv1d(F.conv1d(x, adapter.lora_A), adapter.lora_B, groups=2)
    assert_close(ours(x), before + adapter.scale * u)


def test_a_convolution_whose_weight_is_read_is_refused():
    config = MambaConfig(hidden_size=4, state_size=2, num_hidden_layers=1, vocab_size=8)
    with pytest.raises(TargetError, match="conv1d cannot be adapted: MambaMixer reads its weight without calling it"):
        veneer.get_peft_model(MambaModel(config), veneer.LoraConfig(target_modules=["conv1d"]))

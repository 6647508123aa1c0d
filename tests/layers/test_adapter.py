"""Forward and merge are twins, for every kind and rule; dropout and dtypes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.functional import dora
from veneer.init import Factors, Weight, initialise
from veneer.layers.adapter import RULES, Adapter
from veneer.layers.attach import attach
from veneer.layers.kinds import KINDS, Kind, class_name, kind_of, register_kind
from veneer.layers.route import Route

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(2, 3, 6)),
    "transposed linear": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(0, 7, (2, 3))),
    "scaled embedding": (
        lambda: BartScaledWordEmbedding(7, 5, padding_idx=None, embed_scale=1.7),
        lambda: torch.randint(0, 7, (2, 3)),
    ),
    "conv1d": (lambda: nn.Conv1d(3, 5, 2, stride=2, padding=1), lambda: torch.randn(2, 3, 6)),
    "conv1d without batch": (lambda: nn.Conv1d(3, 5, 2, bias=False), lambda: torch.randn(3, 6)),
    "conv2d": (
        lambda: nn.Conv2d(2, 5, (3, 2), dilation=(1, 2), padding="same", padding_mode="circular"),
        lambda: torch.randn(2, 2, 4, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, padding=(0, 1, 0)), lambda: torch.randn(2, 2, 3, 2, 3)),
}


def make(name: str, rule: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    layer, x = LAYERS[name][0]().to(dtype), LAYERS[name][1]()
    x = x.to(dtype) if x.is_floating_point() else x
    kind = kind_of(layer)
    assert kind is not None
    drawn = initialise("normal_both", Weight(*kind.dims(layer), torch.device("cpu"), lambda: layer.weight), 3)
    shape_A, shape_B = kind.factors(layer, kind.dims(layer), 3)
    factors = Factors(drawn.A.reshape(shape_A), drawn.B.reshape(shape_B))
    magnitude = torch.rand(kind.dims(layer)[0], dtype=torch.float64) + 0.5 if rule == "dora" else None
    adapter = Adapter(kind, factors, scale=0.7, dropout=dropout, magnitude=magnitude).double()
    route = Route()
    route.set(active=("a",))
    return layer, x, adapter, route


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """BA as an (O, I) matrix, whatever the shapes of A and B."""
    return B.flatten(1) @ A.flatten(1)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_merged_weight_gives_the_same_output(name, rule):
    layer, x, adapter, route = make(name, rule)
    base, before = layer.weight.detach().clone(), layer(x)
    attach(layer, "a", adapter, route)
    expected = layer(x)
    assert not torch.allclose(expected, before)
    route.set(enabled=False)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.weight.copy_(adapter.merged(base, base))
    assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_start_that_is_taken_off_the_base(name, rule):
    """The adapter begins as nothing, and is then what a residual base with the trained factors computes."""
    layer, x, adapter, route = make(name, "add")
    base, before = layer.weight.detach().clone(), layer(x)
    start = Factors(adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone())
    W_OI = adapter.kind.to_matrix(base)
    magnitude = adapter.kind.row_norms(base) if rule == "dora" else None
    mine = Adapter(adapter.kind, start, scale=0.7, start=start, magnitude=magnitude).double()
    mine.lora_A = nn.Parameter(start.A.clone())
    mine.lora_B = nn.Parameter(start.B.clone())
    attach(layer, "a", mine, route)
    assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        mine.lora_A.mul_(1.5).add_(0.1)
        mine.lora_B.mul_(0.5).sub_(0.2)
    V_OI = W_OI - 0.7 * product(start.A, start.B) + 0.7 * product(mine.lora_A, mine.lora_B)
    if magnitude is not None:
        V_OI = V_OI * (magnitude / V_OI.norm(dim=1)).unsqueeze(1)
    found = layer(x)
    with torch.no_grad():
        layer.weight.copy_(adapter.kind.from_matrix(V_OI, base.shape))
        assert_close(layer.weight, mine.merged(base, base), rtol=1e-12, atol=1e-12)
    route.set(enabled=False)
    assert_close(found, layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in LAYERS if "embedding" not in name])
def test_a_bias_of_its_own(name):
    layer, x, adapter, route = make(name, "add")
    bare = copy.deepcopy(layer)
    factors = Factors(adapter.lora_A.detach(), adapter.lora_B.detach())
    mine = Adapter(adapter.kind, factors, scale=0.7, bias=torch.randn(5, dtype=torch.float64))
    attach(layer, "a", mine, route)
    delta = mine.delta(layer.weight.shape, torch.float64)
    bias = 0 if bare.bias is None else bare.bias
    values = {"weight": layer.weight + delta, "bias": bias + 0.7 * mine.lora_bias}
    assert_close(layer(x), functional_call(bare, values, x))
    assert_close(mine.bias_delta(torch.float64), 0.7 * mine.lora_bias)


@pytest.mark.parametrize("name", list(LAYERS))
def test_dora_starts_as_the_base(name):
    layer, x, adapter, route = make(name, "add")
    W_OI = adapter.kind.to_matrix(layer.weight.detach())
    with torch.no_grad():
        adapter.lora_B.zero_()
    norms = dora.row_norms(W_OI, adapter.lora_A.flatten(1), adapter.lora_B.flatten(1), adapter.scale)
    before = layer(x)
    factors = Factors(adapter.lora_A.detach(), adapter.lora_B.detach())
    with_magnitude = Adapter(adapter.kind, factors, scale=0.7, magnitude=norms).double()
    attach(layer, "a", with_magnitude, route)
    assert_close(layer(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", list(LAYERS))
def test_dropout_acts_in_training_only_and_keeps_the_mean(name, rule):
    layer, x, adapter, route = make(name, rule, dropout=0.25)
    attach(layer, "a", adapter, route)
    exact = layer.eval()(x)
    assert torch.equal(layer(x), exact)
    layer.train()
    torch.manual_seed(1)
    with torch.no_grad():
        runs = torch.stack([layer(x) for _ in range(4000)])
    spread = runs.std(0)
    assert (spread > 0).any()
    error = (runs.mean(0) - exact).abs()
    assert (error < 5 * spread / 4000**0.5 + 1e-9).all()


@pytest.mark.parametrize("rule", list(RULES))
def test_dropout_of_linear_is_that_of_the_plain_formula(rule):
    layer, x, adapter, route = make("linear", rule, dropout=0.5)
    attach(layer, "a", adapter, route)
    layer.train()
    torch.manual_seed(4)
    found = layer(x)
    torch.manual_seed(4)
    kept = F.dropout(x, 0.5)
    update = 0.7 * kept @ adapter.lora_A.T @ adapter.lora_B.T
    plain = F.linear(x, layer.weight, layer.bias)
    if rule == "add":
        assert_close(found, plain + update)
    else:
        V = layer.weight + 0.7 * adapter.lora_B @ adapter.lora_A
        gain = adapter.lora_magnitude_vector / V.norm(dim=1)
        assert_close(found, plain + (gain - 1) * (kept @ layer.weight.T) + gain * update)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_keeps_the_bases_dtype(base, rule):
    layer, x, adapter, route = make("linear", rule, dtype=base)
    attach(layer, "a", adapter.float(), route)
    y = layer(x)
    assert y.dtype == base
    y.float().sum().backward()
    assert adapter.lora_A.grad.dtype == torch.float32


def test_the_sum_over_a_half_precision_base_is_rounded_once():
    layer, x, adapter, route = make("linear", "add", dtype=torch.bfloat16)
    y = layer(x)
    attach(layer, "a", adapter.float(), route)
    exact = y.double() + adapter.scale * x.double() @ adapter.lora_A.T.double() @ adapter.lora_B.T.double()
    assert torch.equal(layer(x), exact.to(torch.bfloat16))


def test_autocast():
    layer, x, adapter, route = make("linear", "add", dtype=torch.float32)
    attach(layer, "a", adapter.float(), route)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_norm_is_a_constant_and_other_gradients_are_exact(name, rule):
    """Gradients equal those of the plain formula written with whole weights, in float64."""
    layer, x, adapter, route = make(name, rule)
    bare = copy.deepcopy(layer)
    attach(layer, "a", adapter, route)
    layer(x).square().sum().backward()
    found = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    W_OI = adapter.kind.to_matrix(layer.weight.detach()) + adapter.scale * product(adapter.lora_A, adapter.lora_B)
    if rule == "dora":
        W_OI = W_OI * (adapter.lora_magnitude_vector / W_OI.detach().norm(dim=1)).unsqueeze(1)
    weight = adapter.kind.from_matrix(W_OI, layer.weight.shape)
    functional_call(bare, {"weight": weight}, x).square().sum().backward()
    for gradient, parameter in zip(found, adapter.parameters(), strict=True):
        assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_compiled_layer_gives_the_same_output(name, rule):
    layer, x, adapter, route = make(name, rule)
    attach(layer, "a", adapter, route)
    torch.compiler.reset()
    assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_pickled_layer_is_the_same_layer(name):
    layer, x, adapter, route = make(name, "dora")
    attach(layer, "a", adapter, route)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_a_kind_of_ones_own(monkeypatch):
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.bias = None

        def forward(self, x):
            return 2 * F.linear(x, self.weight)

    linear = KINDS["torch.nn.modules.linear.Linear"]
    monkeypatch.setitem(KINDS, class_name(Doubling), linear)  # so that the registration ends with the test
    mine = Kind(
        "doubling",
        dims=lambda layer: tuple(layer.weight.shape),
        update=lambda layer, x, A, B, scale, p: 2 * linear.update(layer, x, A, B, scale, p),
    )
    register_kind(Doubling, mine)
    assert kind_of(Doubling()) is mine
    model = nn.Sequential(Doubling(), nn.Linear(3, 3))
    before = model(x := torch.randn(2, 4))
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    adapter = model[0].adapters["default"]
    update = 2 * adapter.scale * x @ adapter.lora_A.T @ adapter.lora_B.T
    assert_close(adapted(x), before + update @ model[1].weight.T)


def test_dora_after_another_adapter_divides_by_the_norms_of_the_base_alone():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    W, bias, route = layer.weight.detach().clone(), layer.bias.detach().clone(), Route()
    for name in ("a", "b"):
        magnitude = None if name == "a" else torch.rand(4).double()
        factors = Factors(torch.randn(2, 5).double(), torch.randn(4, 2).double())
        attach(layer, name, Adapter(KINDS[class_name(nn.Linear)], factors, scale=0.5, magnitude=magnitude), route)
    route.set(active=("a", "b"))
    total = W
    for name in ("a", "b"):
        total = layer.adapters[name].merged(total, W)
    x = torch.randn(3, 5).double()
    assert_close(layer(x), F.linear(x, total, bias))


def test_a_frozen_factor_is_not_among_what_trains():
    factors = Factors(torch.randn(2, 5), torch.randn(4, 2))
    adapter = Adapter(KINDS[class_name(nn.Linear)], factors, scale=1.0, frozen=("B",))
    assert [parameter is adapter.lora_A for parameter in adapter.trained()] == [True]


def test_dropout_can_be_switched_off_where_trainers_do_it():
    layer, x, adapter, route = make("linear", "add", dropout=0.5)
    attach(layer, "a", adapter, route)
    without = layer.eval()(x)
    for module in layer.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    assert adapter.dropout == 0
    assert_close(layer(x), without)
    adapter.dropout = 0.25
    assert adapter.lora_dropout.p == 0.25

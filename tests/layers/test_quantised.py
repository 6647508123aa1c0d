"""Adapters over weights in few bits: the plain formula on the weight as the layer reads it, and nothing of it kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from layers.weights.forms import FORMS, IN, OUT, ROUNDS_INPUTS, made
from veneer import LoraConfig, get_layer_status
from veneer.errors import AttachError, MergeError, TargetError
from veneer.layers.kinds import PACKED, kind_of
from veneer.layers.weights import quantised, read, reader, write
from veneer.model.apply import add_adapter

RULES = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "dropout": {"lora_dropout": 0.2},
    "dropout under DoRA": {"lora_dropout": 0.2, "use_dora": True},
    "a bias": {"lora_bias": True},
}


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, **fields) -> nn.Module:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **fields})
    model = One(layer)
    add_adapter(model, "default", config, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def inputs(rows: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, rows, IN, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()


def formula(layer: nn.Module) -> nn.Linear:
    """A plain layer with the weight that the quantised one reads."""
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict({"weight": read(layer).float(), "bias": layer.bias.detach().float()})
    return plain


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)  # for what is dropped
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().mean(), [x, *trained])]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_the_plain_formulas(form, rule, monkeypatch):
    layer = made(form, bias=True)
    plain = formula(layer)
    if rule == "dropout under DoRA":  # the plain path here, for a plain layer the fast one, which drops by a seed
        monkeypatch.setattr("veneer.layers.attach.takes_fast_path", lambda *_: False)
    ours = results(adapted(layer, **RULES[rule]), inputs())
    expected = results(adapted(plain, **RULES[rule]), inputs())
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other, atol=float(1e-5 * other.detach().abs().max()), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [f for f in FORMS if f != "bnb int8"])
def test_in_half_precision_and_under_autocast(form, dtype):
    """The factors stay in float32; what the layer itself rounds is the base's."""
    layer = made(form, bias=True, dtype=torch.bfloat16)
    plain = formula(layer).to(torch.bfloat16)
    model, other = adapted(layer), adapted(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        x = inputs(dtype=torch.bfloat16)
        ours, expected = results(model, x), results(other, x)
    assert ours[0].dtype == expected[0].dtype
    for one, two in zip(ours, expected, strict=True):
        assert_close(one.float(), two.float(), atol=float(0.03 * two.detach().abs().max()), rtol=0.02)


@pytest.mark.parametrize("rule", ["LoRA", "DoRA", "PiSSA", "dropout"])
@pytest.mark.parametrize("form", FORMS)
def test_no_weight_is_kept_for_the_backward_pass(form, rule):
    model = adapted(made(form, bias=True), **RULES[rule])
    assert [layer.path for layer in get_layer_status(model)] == ["fast"]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = model(inputs())
    assert max(t.numel() for t in kept) < OUT * IN
    y.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_is_read_once_in_a_backward_pass(form, monkeypatch):
    from veneer.layers import fast_path

    model, times = adapted(made(form)), []
    original = fast_path.reader

    def counting(layer):
        found = original(layer)
        return lambda: (times.append(1), found())[1]

    monkeypatch.setattr(fast_path, "reader", counting)
    y = model(inputs())
    assert not times
    y.sum().backward()
    assert len(times) == 1
    with torch.no_grad():
        model(inputs())
    assert len(times) == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_pass_reads_the_weight_of_its_forward_pass(form):
    layer = made(form)
    model = adapted(layer)
    expected = results(model, inputs())[1]
    x = inputs()
    loss = model(x).square().mean()
    again = reader(layer)
    W = again()
    rounded, _ = quantised(layer, "weight", 2 * read(layer))
    write(layer, "weight", rounded)
    assert torch.equal(again(), W)
    loss.backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("form", ["bnb nf4", "torchao int8", "quanto int8"])
def test_second_derivatives(form):
    layer = made(form, bias=True)
    found = []
    for model in (adapted(layer), adapted(formula(made(form, bias=True)))):
        x = inputs()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(g.square().sum(), [x, *trained]))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, atol=float(1e-4 * other.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("form", ["bnb nf4", "torchao int4", "quanto int8"])
def test_taken_off_it_is_what_it_was(form):
    layer = made(form)
    before, weight = type(layer), layer.weight
    x = inputs()
    y = layer(x)
    model = adapted(layer)
    assert isinstance(layer, before)
    model.layer.delete_adapter("default")
    assert type(layer) is before
    assert layer.weight is weight
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("form", ROUNDS_INPUTS)
def test_inputs_in_few_bits_cannot_be_trained_through(form):
    with pytest.raises(AttachError, match="lets no gradient through.*Quantise weights alone"):
        adapted(made(form))
    layer = made(form)
    x = inputs().detach()
    y = layer(x)
    model = One(layer)
    add_adapter(model, "default", LoraConfig(target_modules=["layer"], inference_mode=True))
    assert torch.equal(model(x), y)


def packed(name: str, module: str) -> nn.Module:
    """A stand-in for a layer of a library that is not here: it keeps integers in a buffer, and is no Linear."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = IN, OUT, None
        self.register_buffer("qweight", torch.arange(-50, 50, dtype=torch.int32).repeat(OUT, 2)[:, :IN])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight.to(x.dtype) / 64)

    base = type(name, (nn.Module,), {"__module__": module, "__init__": __init__, "forward": forward})
    return type("KernelLinear", (base,), {})()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("BaseQuantLinear", "gptqmodel.nn_modules.qlinear"),
        ("WQLinear_GEMM", "awq.modules.linear.gemm"),
        ("QuantizedLinear", "aqlm.inference"),
    ],
)
def test_packed_layers_that_cannot_be_read(name, module):
    layer = packed(name, module)
    assert kind_of(layer) is PACKED
    x = inputs()
    y, W = layer(x), layer.qweight / 64
    model = adapted(layer, target_modules="all-linear")
    plain = nn.Linear(IN, OUT, bias=False)
    plain.weight = nn.Parameter(W, requires_grad=False)
    for one, other in zip(results(model, inputs()), results(adapted(plain), inputs()), strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)
    with pytest.raises(MergeError, match="KernelLinear is not a plain tensor"):
        model.layer.merge()
    assert get_layer_status(model)[0].path == "plain: the layer's forward is not torch.nn.Linear's"
    for fields in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(MergeError, match=r"KernelLinear is not a plain tensor.* Plain LoRA over it works"):
            adapted(packed(name, module), **fields)
    model.layer.delete_adapter("default")
    assert torch.equal(layer(x), y)


def test_a_layer_of_an_unknown_library_says_what_it_is():
    with pytest.raises(TargetError, match="KernelLinear"):
        adapted(packed("Unheard", "of"))


def test_hqq():
    hqq = pytest.importorskip("hqq.core.quantize")
    found = []
    for rule in ({}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        torch.manual_seed(0)
        layer = hqq.HQQLinear(
            nn.Linear(IN, OUT),
            hqq.BaseQuantizeConfig(nbits=4, group_size=64),
            compute_dtype=torch.float32,
            device="cpu",
        )
        model, other = adapted(layer, **rule), adapted(formula(layer), **rule)
        assert get_layer_status(model)[0].quantization_backend == "hqq"
        for one, two in zip(results(model, inputs()), results(other, inputs()), strict=True):
            assert_close(one, two, atol=1e-4, rtol=1e-4)
        found.append(model)
    with pytest.raises(MergeError, match="can be read, not made"):
        found[0].layer.merge()

"""The rule "dora" in a layer: by the fast path and the plain one, in training, recomputation and inference."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.functional import dora_dropout
from veneer.functional.dora_dropout import dora_dropped_plainly
from veneer.layers import attach as attach_module
from veneer.layers import dora as rule

FIELDS = {"r": 2, "lora_alpha": 3, "target_modules": ["0", "2"], "use_dora": True}


def adapted(dtype=torch.float64, *, bias=True, make=nn.Linear, **fields) -> nn.Module:
    first, second = (make(6, 5, bias=bias), make(5, 6, bias=bias)) if make is nn.Linear else (make(5, 6), make(6, 5))
    model = veneer.get_peft_model(nn.Sequential(first, nn.Tanh(), second), veneer.LoraConfig(**{**FIELDS, **fields}))
    for name, parameter in model.to(dtype).named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def inputs(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*(shape or (3, 4)), 6, dtype=dtype).requires_grad_()


def results(model: nn.Module, x: Tensor, run=None) -> list[Tensor]:
    model.zero_grad()
    x.grad = None
    y = model(x) if run is None else run(model, x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def by_formula(adapter, x: Tensor, y: Tensor, layer, p: float) -> Tensor:
    """The rule as the paper writes it."""
    V = layer.weight + adapter.delta(layer.weight.shape, layer.weight.dtype)
    V = adapter.kind.to_matrix(V)
    g = adapter.lora_magnitude_vector / V.detach().norm(dim=1)
    return nn.functional.linear(x, g.unsqueeze(1) * V, layer.bias)


def plainly(monkeypatch, model: nn.Module, x: Tensor, run=None, forward=by_formula) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(attach_module, "takes_fast_path", lambda *_: False)
        patch.setitem(
            attach_module.Adapter.forward.__globals__["RULES"],
            "dora",
            type("R", (), {"forward": staticmethod(forward)}),
        )
        return results(model, x, run)


def same(mine, theirs, **tolerance) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one, other, **tolerance)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{}, {"bias": False}, {"make": Conv1D}, {"init_lora_weights": "pissa"}, {"bias": True, "dtype": torch.float32}],
    ids=str,
)
def test_it_is_the_paper_s_formula(fields, fast, monkeypatch):
    dtype = fields.get("dtype", torch.float64)
    model, x = adapted(**fields), inputs(dtype=dtype)
    if not fast:
        monkeypatch.setattr(attach_module, "takes_fast_path", lambda *_: False)
    same(results(model, x), plainly(monkeypatch, model, x))


def test_trained_biases_get_their_gradient(monkeypatch):
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)).double()
    model, x = veneer.get_peft_model(base, veneer.LoraConfig(**FIELDS, bias="lora_only")).double(), inputs()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    found = results(model, x)
    assert len(found) == 2 + 2 * 4
    same(found, plainly(monkeypatch, model, x))


def test_low_precision_bases_with_float32_factors():
    """As near to float64 as the dtype of the layer allows: the magnitudes' effect is rounded with the output."""
    model = adapted(torch.float32).eval()
    exact = [p.detach().double() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    exact = [p.detach().double() for p in model.parameters()]
    x = inputs(50, dtype=torch.bfloat16)
    found = model(x)
    assert found.dtype == torch.bfloat16
    twin = adapted(torch.float64).eval()
    true = functional_call(twin, dict(zip(names, exact, strict=True)), (x.detach().double(),))
    assert_close(found.double(), true, rtol=0.03, atol=0.05)


class TestDropout:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(dora_dropout, "FEWEST_ROWS", 1)

    @pytest.mark.parametrize(("p", "sparse"), [(0.1, True), (0.4, False)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_fast_path_is_the_formula_with_a_mask(self, bias, p, sparse, monkeypatch):
        model, x = adapted(bias=bias, lora_dropout=p), inputs(3, 20)
        seeds = iter([5, 6, 5, 6])
        monkeypatch.setattr(rule, "new_seed", lambda: next(seeds))

        def forward(adapter, x, y, layer, p):
            (A, B), W = adapter.factors(), layer.weight
            norms = (W + adapter.scale * B @ A).detach().norm(dim=1)
            g = adapter.lora_magnitude_vector / norms
            return dora_dropped_plainly(x, layer.bias, A, B, g, W, adapter.scale, p, next(seeds), sparse)

        same(results(model, x), plainly(monkeypatch, model, x, forward=forward))

    @pytest.mark.parametrize("fast", [True, False])
    def test_the_mean_is_what_evaluation_gives(self, fast, monkeypatch):
        if not fast:
            monkeypatch.setattr(attach_module, "takes_fast_path", lambda *_: False)
        base = nn.Sequential(nn.Linear(6, 5))
        model = veneer.get_peft_model(base, veneer.LoraConfig(**{**FIELDS, "target_modules": ["0"]}, lora_dropout=0.1))
        model.base_model.model[0].adapters["default"].lora_B.data.normal_()
        model.base_model.model[0].adapters["default"].lora_magnitude_vector.data += 0.5
        x = torch.randn(1, 6)
        with torch.no_grad():
            mean = model(x.expand(200_000, 6)).mean(0, keepdim=True)
            assert_close(mean, model.eval()(x), rtol=0.01, atol=0.01)

    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_drops_the_same_again(self, reentrant, fast, monkeypatch):
        if not fast:
            monkeypatch.setattr(attach_module, "takes_fast_path", lambda *_: False)
        model, x = adapted(lora_dropout=0.1), inputs()

        def run(model, x):
            return checkpoint(model, x, use_reentrant=reentrant)

        torch.manual_seed(2)
        first = results(model, x)
        torch.manual_seed(2)
        same(results(model, x, run), first)

    def test_bfloat16_and_autocast_keep_one_output_beside_what_lora_keeps(self):
        for dtype in (torch.bfloat16, torch.float32):
            layer = adapted(dtype, lora_dropout=0.1).base_model.model[0]
            x, kept = inputs(50, dtype=dtype), []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
                if dtype == torch.float32:
                    with torch.autocast("cpu"):
                        z = layer(x)
                else:
                    z = layer(x)
            assert z.dtype == torch.bfloat16
            assert sum(t.shape == (x.numel() // x.shape[-1], z.shape[-1]) for t in kept) == 1
            torch.testing.assert_close(z.float(), layer.eval()(x).float(), rtol=1, atol=2)  # the same up to dropout


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model, x = adapted(), inputs()
    same(results(model, x, lambda model, x: checkpoint(model, x, use_reentrant=reentrant)), results(model, x))


def test_gradients_of_gradients(monkeypatch):
    model, x = adapted(), inputs()
    trained = [p for p in model.parameters() if p.requires_grad]

    def second(forward=None):
        y = model(x)
        first = torch.autograd.grad(y.square().sum(), [x, *trained], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *trained])

    mine = second()
    monkeypatch.setattr(attach_module, "takes_fast_path", lambda *_: False)
    same(mine, second())


@pytest.mark.parametrize("grad", [True, False])
def test_compiled(grad):
    model, x = adapted(torch.float32), inputs(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        if grad:
            same(results(compiled, x), results(model, x))
        model.eval()
        expected = model(x)
        assert_close(compiled(x), expected)
        assert_close(model(x), expected)


def test_autocast():
    model, x = adapted(torch.float32), inputs(200, dtype=torch.float32)
    exact = results(model, x)
    with torch.autocast("cpu"):
        found = results(model, x)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, exact, strict=True):
        assert (one.float() - other).norm() < 0.05 * other.norm()


def test_many_factors_at_once():
    model, x = adapted(), inputs()
    stacked = {n: torch.stack([p, 1.1 * p]).detach() for n, p in model.named_parameters() if "lora_" in n}
    found = vmap(lambda values: functional_call(model, values, (x,)))(stacked)
    for i in range(2):
        assert_close(found[i], functional_call(model, {n: v[i] for n, v in stacked.items()}, (x,)))


def test_a_training_step_keeps_one_tensor_of_the_outputs_size_a_layer():
    model, x, kept = adapted(), inputs(30, 1), []
    layer = model.base_model.model[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    # x, h and v, of 30 rows each
    assert sorted({t.data_ptr(): t.numel() for t in kept if t.numel() >= 60}.values()) == [60, 150, 180]


def test_the_output_without_gradients_is_not_shared():
    model, x = adapted().eval(), inputs().detach()
    with torch.no_grad():
        first = model(x)
        again = first.clone()
        model(2 * x)
    assert torch.equal(first, again)

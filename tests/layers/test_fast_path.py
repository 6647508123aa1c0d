"""The fast path in a layer: the plain path's numbers, taken wherever it fits and nowhere else."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import veneer
from veneer.functional import lora_linear
from veneer.layers import attach as attach_module
from veneer.layers import fast_path


class Reader(nn.Module):
    """Four layers, three of which read one input."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 5, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(6, 4, bias=bias, dtype=dtype)
        self.v_proj = nn.Linear(6, 5, bias=bias, dtype=dtype)
        self.o_proj = nn.Linear(5, 6, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.o_proj(torch.tanh(q) * v * k.sum(-1, keepdim=True))


def adapted(dtype: torch.dtype = torch.float64, *, with_bias: bool = True, blocks: int = 2, **fields) -> nn.Module:
    """An adapted stack of readers in which every adapter does something."""
    base = nn.Sequential(*(Reader(with_bias, dtype) for _ in range(blocks)))
    config = {"r": 2, "target_modules": "all-linear", "exclude_modules": [], "lora_alpha": 3, **fields}
    model = veneer.get_peft_model(base, veneer.LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter, dtype=dtype)
    return model


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (3, 20)), 6, dtype=dtype).requires_grad_()


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How often the two functions of the fast path ran, and for how many layers the first multiplied."""
    counts = {"project": 0, "layers": 0, "frozen_linear": 0}
    project, frozen_linear = lora_linear.project, lora_linear.frozen_linear

    def count_project(x, As, p=0.0):
        counts["project"] += 1
        counts["layers"] += len(As)
        return project(x, As, p)

    def count_linear(*args):
        counts["frozen_linear"] += 1
        return frozen_linear(*args)

    monkeypatch.setattr(lora_linear, "project", count_project)
    monkeypatch.setattr(lora_linear, "frozen_linear", count_linear)
    return counts


def results(model: nn.Module, x: Tensor, run=None) -> list[Tensor]:
    """The output, and the gradients of the input and of everything that trains."""
    model.zero_grad()
    x.grad = None
    y = model(x) if run is None else run(model, x)
    y.square().sum().backward()
    return [y, *([] if x.grad is None else [x.grad]), *(p.grad for p in model.parameters() if p.requires_grad)]


def plainly(monkeypatch, model: nn.Module, x: Tensor, run=None) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(attach_module, "takes_fast_path", lambda *_: False)
        return results(model, x, run)


def same(mine: list[Tensor], theirs: list[Tensor], **tolerance) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}, None], ids=str
)
def test_it_is_the_plain_path(fields, counted, monkeypatch):
    """None: layers without a bias."""
    model, x = adapted(with_bias=False) if fields is None else adapted(**fields), inputs()
    same(results(model, x), plainly(monkeypatch, model, x))
    assert counted["frozen_linear"] == 8


def test_layers_that_read_one_input_share_a_product(counted):
    results(adapted(), inputs())
    assert counted == {"project": 4, "layers": 8, "frozen_linear": 8}  # q, k and v; then o; twice


def test_few_inputs_are_not_worth_sharing(counted):
    results(adapted(), inputs(2))
    assert counted == {"project": 8, "layers": 8, "frozen_linear": 8}


def test_dropout_is_each_layer_s_own(counted, monkeypatch):
    model, x = adapted(lora_dropout=0.3), inputs()
    torch.manual_seed(1)
    first = results(model, x)
    assert counted == {"project": 8, "layers": 8, "frozen_linear": 8}
    torch.manual_seed(1)
    same(results(model, x), first, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        same(results(model, x), first)
    same(results(model.eval(), x), plainly(monkeypatch, model, x))


def test_the_mean_over_dropouts_is_the_output_without():
    layer = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    model = veneer.get_peft_model(layer, veneer.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.2))
    model.base_model.model[0].adapters["default"].double().lora_B.data.normal_()
    x = inputs(4).detach()
    mean = torch.stack([model(x) for _ in range(20_000)]).mean(0)
    torch.testing.assert_close(mean, model.eval()(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointing_computes_the_same_again(p, reentrant):
    model, x = adapted(lora_dropout=p), inputs()

    def run(model, x):
        for block in model.base_model.model:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    torch.manual_seed(2)
    first = results(model, x)
    torch.manual_seed(2)
    same(results(model, x, run), first)


def test_gradients_of_gradients(monkeypatch):
    model, x = adapted(blocks=1), inputs(2, 8)
    trained = [p for p in model.parameters() if p.requires_grad]

    def twice() -> list[Tensor]:
        first = torch.autograd.grad(model(x).square().sum(), [x, *trained], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *trained]))

    mine = twice()
    with monkeypatch.context() as patch:
        patch.setattr(attach_module, "takes_fast_path", lambda *_: False)
        same(mine, twice())


@pytest.mark.parametrize(("base", "factors"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_bfloat16_is_as_near_to_the_truth_as_the_plain_path(base, factors, counted, monkeypatch):
    model = adapted(base, blocks=1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(factors)
    truth = copy.deepcopy(model).double()
    x = inputs(4, 30, dtype=base)
    exact = results(truth, x.detach().double().requires_grad_())
    mine, plain = results(model, x), plainly(monkeypatch, model, x)
    assert counted["frozen_linear"] > 4
    assert all(one.dtype == other.dtype for one, other in zip(mine, plain, strict=True))

    assert error(mine, exact) < 2 * error(plain, exact) < 0.1


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a tensor."""
    pairs = zip(found, exact, strict=True)
    return max(float((one.detach().double() - t.detach()).norm() / t.detach().norm()) for one, t in pairs)


def test_autocast(counted, monkeypatch):
    model, x = adapted(torch.float32, blocks=1), inputs(dtype=torch.float32)

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    exact = results(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
    mine, plain = results(model, x, run), plainly(monkeypatch, model, x, run)
    assert counted["frozen_linear"] == 8
    assert error(mine, exact) < 2 * error(plain, exact) < 0.1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True, "lora_dropout": 0.9}, None),
        ({"lora_dropout": 0.9}, None),
    ],
    ids=str,
)
def test_what_does_not_fit_takes_the_plain_path(changed, reason, counted, monkeypatch):
    model = adapted(**changed)
    layer = model.base_model.model[0].q_proj
    assert fast_path.why_plain(layer, layer.adapters["default"]) == reason
    results(model, inputs())
    assert counted["project"] == 0


def test_several_adapters_at_once_are_added_plainly(counted):
    model, x = adapted(), inputs()
    model.add_adapter("other", veneer.LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    model.base_model.set_adapter(["default", "other"])
    results(model, x)
    assert counted == {"project": 4, "layers": 4, "frozen_linear": 4}  # k and v; with two names, nothing is shared


def test_a_trained_base_weight_takes_the_plain_path(counted):
    model, x = adapted(), inputs()
    model.base_model.model[0].q_proj.weight.requires_grad_(True)
    results(model, x)
    assert model.base_model.model[0].q_proj.weight.grad is not None
    assert counted["frozen_linear"] == 7


def test_a_class_with_a_forward_of_its_own_takes_the_plain_path(counted):
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Renamed(nn.Linear):
        pass

    base = nn.Sequential(Doubled(6, 6), Renamed(6, 6))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["0", "1"]))
    x = torch.randn(3, 6)
    y = model(x)
    assert counted["frozen_linear"] == 1
    twin = 2 * F.linear(x, base[0].weight, base[0].bias)
    torch.testing.assert_close(y, F.linear(twin, base[1].weight, base[1].bias))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_compilers_and_tracers_take_the_plain_path(counted):
    model, x = adapted(blocks=1), inputs().detach()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    per_row = vmap(grad(loss), (None, 0))(trained, x)
    for i, row in enumerate(x):
        for name, value in grad(loss)(trained, row).items():
            torch.testing.assert_close(per_row[name][i], value)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert counted["project"] == 0
    torch.testing.assert_close(compiled(x), model(x))


def test_reading_a_hook_s_tensors_goes_on(counted):
    model, x = adapted(blocks=1), inputs()
    seen = []
    layer = model.base_model.model[0].q_proj
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    layer.register_full_backward_hook(lambda module, g_in, g_out: seen.append((g_in[0].clone(), g_in[0])))
    results(model, x)
    assert seen[0][0] is x or seen[0][0].shape == x.shape
    assert torch.equal(*seen[1])


def test_a_bare_copy_and_a_pickle_know_their_own_neighbours(counted):
    model, x = adapted(blocks=1), inputs()
    again = copy.deepcopy(model)
    block, theirs = again.base_model.model[0], model.base_model.model[0]
    assert all(one in list(block.modules()) for one in vars(block.q_proj.adapters)["siblings"])
    theirs.k_proj.adapters["default"].lora_A.data.zero_()
    same(results(again, x)[:1], [again(x)])
    assert not torch.allclose(again(x), model(x))


class TestSharing:
    """A part that was multiplied for a layer is used only if it is what the layer would have computed."""

    def block(self, **fields):
        model = adapted(blocks=1, **fields)
        return model, model.base_model.model[0]

    def expected(self, layer: nn.Module, x: Tensor) -> Tensor:
        own = layer.adapters["default"]
        return F.linear(x, layer.weight, layer.bias) + own.scale * x @ own.lora_A.T @ own.lora_B.T

    def test_an_input_changed_in_between(self):
        _, block = self.block()
        x = inputs().detach()
        block.q_proj(x)
        x.add_(1)
        torch.testing.assert_close(block.k_proj(x), self.expected(block.k_proj, x))

    def test_factors_changed_in_between(self):
        _, block = self.block()
        x = inputs()
        block.q_proj(x)
        with torch.no_grad():
            block.k_proj.adapters["default"].lora_A.mul_(2)
        block.v_proj.adapters["default"].lora_A = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
        for layer in (block.k_proj, block.v_proj):
            torch.testing.assert_close(layer(x), self.expected(layer, x))

    def test_gradients_asked_for_in_between(self):
        _, block = self.block()
        x = inputs()
        with torch.no_grad():
            block.q_proj(x)
        y = block.k_proj(x)
        torch.autograd.grad(y.sum(), [x, block.k_proj.adapters["default"].lora_A])
        block.q_proj(x)
        with torch.no_grad():
            assert block.k_proj(x).grad_fn is None

    def test_training_asked_for_in_between(self):
        _, block = self.block()
        x = inputs()
        A = block.k_proj.adapters["default"].lora_A.requires_grad_(False)
        block.q_proj(x)
        A.requires_grad_(True)
        block.k_proj(x).sum().backward()
        assert A.grad is not None

    def test_backward_in_between(self):
        _, block = self.block()
        x = inputs()
        block.q_proj(x).sum().backward()
        before = x.grad.clone()
        block.k_proj(x).sum().backward()
        assert not torch.equal(x.grad, before)

    def test_another_input_multiplies_anew(self, counted):
        _, block = self.block()
        x, z = inputs(), inputs()
        block.q_proj(x)
        for layer in (block.k_proj, block.v_proj):
            torch.testing.assert_close(layer(z), self.expected(layer, z))
        assert counted == {"project": 2, "layers": 5, "frozen_linear": 3}

    def test_a_neighbour_that_drops_or_has_no_adapter_is_left_out(self, counted):
        model, block = self.block(target_modules=["q_proj", "k_proj"])
        results(model, inputs())
        assert counted["layers"] == 2
        block.k_proj.adapters["default"].dropout = 0.3
        counted.update(project=0, layers=0)
        results(model.train(), inputs())
        assert counted["project"] == 2

    def test_each_thread_has_its_own(self):
        model, _ = self.block()
        wanted = {}
        found = {}
        xs = {n: inputs() for n in range(4)}
        for n, x in xs.items():
            wanted[n] = model(x).detach()

        def work(n: int) -> None:
            found[n] = [model(xs[n]).detach() for _ in range(50)]

        threads = [threading.Thread(target=work, args=(n,)) for n in xs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(y, wanted[n]) for n in xs for y in found[n])

    def test_keys_and_values_of_cross_attention_share_without_the_queries(self, counted):
        class Cross(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder_attn = Reader()

            def forward(self, x: Tensor, seen: Tensor) -> Tensor:
                own = self.encoder_attn
                return own.o_proj(own.q_proj(x) * own.k_proj(seen).sum(-1, keepdim=True) * own.v_proj(seen))

        model = veneer.get_peft_model(Cross(), veneer.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
        model.double()(inputs(), inputs())
        assert counted == {"project": 2, "layers": 3, "frozen_linear": 3}

    def test_outputs_with_backward_passes_of_their_own_say_what_to_do(self):
        _, block = self.block()
        x = inputs()
        q, k = block.q_proj(x), block.k_proj(x)
        q.sum().backward()
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            k.sum().backward()

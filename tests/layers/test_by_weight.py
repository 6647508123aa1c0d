"""Adapters on parameters that their module reads: what is computed, and that nobody else sees it."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tiny_moe import Experts
from veneer.errors import AttachError
from veneer.init import Factors
from veneer.layers import by_weight
from veneer.layers.adapter import Adapter
from veneer.layers.attach import adapter_on, detach
from veneer.layers.by_weight import ByWeight, merged_weight
from veneer.layers.kinds import Stack, parameter_kind
from veneer.layers.part import Part
from veneer.layers.route import Route, Step


def an_adapter(weight: torch.Tensor, *, transposed: bool = False, rank: int = 2, seed: int = 1, dora: bool = False):
    kind = parameter_kind(Stack.of(weight, transposed=transposed))
    generator = torch.Generator().manual_seed(seed)
    shape = kind.dims(None)
    A, B = (torch.randn(s, generator=generator, dtype=weight.dtype) for s in kind.factors(None, shape, rank))
    magnitude = torch.rand(shape[0], generator=generator, dtype=weight.dtype) + 0.5 if dora else None
    return Adapter(kind, Factors(A, B), scale=0.5, magnitude=magnitude)


def adapted(*parameters: str, names=("a",), transposed: bool = False, dtype=torch.float64, dora: bool = False):
    module = Experts(transposed=transposed).to(dtype)
    module.requires_grad_(False)
    route = Route()
    route.set(active=tuple(names))
    for seed, name in enumerate(names):
        for parameter in parameters:
            adapter = an_adapter(getattr(module, parameter), transposed=transposed, seed=seed, dora=dora)
            by_weight.attach(module, name, adapter, route, parameter)
    return module


def by_hand(adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
    """s·BA of each expert, written out: rows of A are expert-major, columns of B rank-major."""
    if weight.dim() == 2:
        return adapter.scale * adapter.lora_B @ adapter.lora_A
    E, rank = len(weight), len(adapter.lora_A) // len(weight)
    deltas = []
    for e in range(E):
        A = adapter.lora_A[e * rank : (e + 1) * rank]
        B = adapter.lora_B[:, e::E]
        deltas.append(adapter.scale * B @ A)
    return torch.stack(deltas)


def plain(module: Experts, *names: str) -> Experts:
    """The same module without adapters, over weights that hold them."""
    base = Experts(transposed=module.is_transposed).to(module.up.dtype)
    with torch.no_grad():
        for name in names:
            for parameter, adapter in module.adapters[name].items():
                delta = by_hand(adapter, getattr(base, parameter))
                getattr(base, parameter).add_(delta.mT if module.is_transposed and delta.dim() == 3 else delta)
    return base


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parameters", [("up",), ("up", "down"), ("table",), ("up", "down", "table")])
def test_the_module_computes_the_plain_formula(parameters, transposed):
    module = adapted(*parameters, transposed=transposed)
    assert_close(module(X), plain(module, "a")(X))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_reach_the_factors(transposed):
    module = adapted("up", "down", transposed=transposed)
    module(X).square().sum().backward()
    twin = adapted("up", "down", transposed=transposed)
    found = {name: adapter for name, adapter in twin.adapters["a"].items()}
    base = Experts(transposed=transposed).double()
    weights = {}
    for name, one in found.items():
        W = getattr(base, name)
        weights[name] = W + (by_hand(one, W.mT).mT if transposed else by_hand(one, W))
    torch.func.functional_call(base, weights, X).square().sum().backward()
    for name, one in found.items():
        got = adapter_on(module, "a", name)
        assert_close(got.lora_A.grad, one.lora_A.grad)
        assert_close(got.lora_B.grad, one.lora_B.grad)
    assert module.up.grad is None


def test_several_adapters_add_up_and_a_second_may_adapt_other_parameters():
    module = adapted("up", "down", names=("a", "b"))
    assert_close(module(X), plain(module, "a", "b")(X))
    by_weight.attach(module, "c", an_adapter(module.table), module._veneer_route, "table")
    module._veneer_route.set(active=("a", "c"))
    assert_close(module(X), plain(module, "a", "c")(X))
    module._veneer_route.set(active=("a",), enabled=False)
    assert torch.equal(module(X), Experts().double()(X))


@pytest.mark.parametrize("parameter", ["up", "table"])
def test_dora_scales_the_rows_of_each_matrix(parameter):
    module = adapted(parameter, dora=True)
    W, adapter = getattr(module, parameter), adapter_on(module, "a", parameter)
    updated = (W + by_hand(adapter, W)).reshape(-1, W.shape[-1])
    expected = adapter.lora_magnitude_vector.unsqueeze(1) * updated / updated.norm(dim=1, keepdim=True)
    assert_close(merged_weight(W, [adapter]), expected.reshape(W.shape))
    base = Experts().double()
    getattr(base, parameter).data = expected.detach().reshape(W.shape)
    assert_close(module(X), base(X))


def test_nobody_else_sees_the_sum():
    module = adapted("up")
    registered = module._parameters["up"]
    seen = {}

    class Spy(nn.Module):
        def forward(self, x):
            seen["state"] = module.state_dict()["up"]
            seen["named"] = dict(module.named_parameters())["up"]
            seen["read"] = module.up
            return x

    spy = Spy()
    expert = Experts._expert
    module._expert = lambda x, e: expert(module, spy(x), e)
    module(X)
    assert module.up is registered
    assert seen["named"] is registered
    assert seen["state"].data_ptr() == registered.data_ptr()
    assert seen["read"] is not registered
    assert list(module.state_dict())[:4] == ["up", "down", "table", "scales"]
    assert list(module.state_dict())[4:] == ["adapters.a.up.lora_A", "adapters.a.up.lora_B"]


def test_a_forward_that_fails_leaves_nothing_behind():
    module = adapted("up")
    registered = module._parameters["up"]
    with pytest.raises(RuntimeError):
        module(torch.randn(5, 3, dtype=torch.float64))
    assert module.up is registered
    assert by_weight._INSIDE.frames == ()


def test_threads_do_not_see_each_others_weights():
    module = adapted("up")
    registered = module._parameters["up"]
    expected = module(X)
    inside, may_go = threading.Event(), threading.Event()
    expert = Experts._expert
    answers = {}

    def slow(x, e):
        if threading.current_thread().name == "slow":
            inside.set()
            may_go.wait(10)
        return expert(module, x, e)

    module._expert = slow
    thread = threading.Thread(target=lambda: answers.update(slow=module(X)), name="slow")
    thread.start()
    assert inside.wait(10)
    assert module.up is registered
    assert_close(module(X), expected)
    may_go.set()
    thread.join()
    assert_close(answers["slow"], expected)


@pytest.mark.parametrize(("backend", "dora"), [("eager", True), ("aot_eager", False)])
def test_it_compiles_as_one_graph(backend, dora):
    torch._dynamo.reset()
    module = adapted("up", "down", names=("a", "b"), dora=dora)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend=backend)
    assert_close(compiled(X), module(X))
    compiled(X).sum().backward()
    module(X).sum().backward()
    got = adapter_on(compiled._orig_mod, "b", "down").lora_A.grad
    assert_close(got, adapter_on(module, "b", "down").lora_A.grad)
    compiled._orig_mod._veneer_route.set(active=("a",))
    module._veneer_route.set(active=("a",))
    assert_close(compiled(X), module(X))
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(reentrant):
    module, again = adapted("up", "down"), adapted("up", "down")
    x = X.clone().requires_grad_()
    module(x).square().sum().backward()
    z = X.clone().requires_grad_()
    checkpoint(again, z, use_reentrant=reentrant).square().sum().backward()
    assert_close(z.grad, x.grad)
    for name in ("up", "down"):
        assert_close(adapter_on(again, "a", name).lora_B.grad, adapter_on(module, "a", name).lora_B.grad)


def test_copies_and_pickles_stand_alone():
    module = adapted("up", "table")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert_close(twin(X), module(X))
        twin.adapters["a"].up.lora_A.data.zero_()
        twin.adapters["a"].table.lora_A.data.zero_()
        assert torch.equal(twin(X), Experts().double()(X))
        assert not torch.equal(module(X), twin(X))


def test_detaching_gives_the_module_back():
    module = adapted("up", "down", names=("a", "b"))
    detach(module, "a")
    assert isinstance(module, ByWeight)
    assert_close(module(X), plain(module, "b")(X))
    detach(module, "b")
    assert type(module) is Experts
    assert "adapters" not in module._modules
    assert torch.equal(module(X), Experts().double()(X))


def test_part_of_a_batch_is_refused():
    module = adapted("up")
    module._veneer_route.plan = (Step("a", Part(5, torch.tensor([0, 1]))),)
    with pytest.raises(AttachError, match=r"Experts reads for the whole batch.*set_adapter"):
        module(X)


def test_a_parameter_that_became_something_else_is_refused():
    module = adapted("up")
    replica = module._replicate_for_data_parallel()  # what torch.nn.DataParallel does
    replica.up = module._parameters["up"].data
    with pytest.raises(AttachError, match=r"up of Experts is no registered parameter.*DataParallel"):
        replica(X)
    nn.utils.parametrize.register_parametrization(module, "up", nn.Identity())
    with pytest.raises(AttachError, match="no registered parameter"):
        module(X)


def test_the_weight_keeps_its_dtype_and_autocast_does_not_coarsen_it():
    module = adapted("up", dtype=torch.bfloat16)
    adapter_on(module, "a", "up").float()
    assert module._effective()["up"].dtype == torch.bfloat16
    exact = adapted("up", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact._effective()["up"], merged_weight(exact.up, [adapter_on(exact, "a", "up")]))
        inside = exact._effective()["up"]
    assert torch.equal(inside, exact._effective()["up"])


def test_norms_of_a_half_precision_weight_are_exact():
    weight = torch.randn(3, 6, 4, dtype=torch.bfloat16)
    adapter = an_adapter(weight.float(), dora=True)
    exact = adapter.double().merged(weight.double(), weight.double())
    adapter.float()
    assert_close(merged_weight(weight, [adapter]), exact.bfloat16(), rtol=0, atol=0)


def test_factors_of_a_stack_join_and_add():
    stack = Stack(3, 6, 4)
    generator = torch.Generator().manual_seed(0)
    A = [torch.randn(2, 4, generator=generator) for _ in range(3)]
    B = [torch.randn(6, 2, generator=generator) for _ in range(3)]
    joined = stack.joined(A, B)
    assert_close(stack.delta(*joined, 0.5, (3, 6, 4)), torch.stack([0.5 * b @ a for a, b in zip(A, B, strict=True)]))
    more = stack.joined(A[::-1], B[::-1])
    both = stack.delta(*stack.summed(*joined, *more), 0.5, (3, 6, 4))
    assert_close(both, stack.delta(*joined, 0.5, (3, 6, 4)) + stack.delta(*more, 0.5, (3, 6, 4)))


@pytest.mark.parametrize("stack", [Stack(1, 6, 4), Stack(3, 6, 4), Stack(3, 6, 4, transposed=True)])
def test_a_stack_as_a_matrix_and_back(stack):
    shape = (3, 4, 6) if stack.transposed else (stack.matrices, 6, 4)
    W = torch.randn(shape)
    matrix = stack.to_matrix(W)
    assert matrix.shape == stack.dims(None)
    assert torch.equal(stack.from_matrix(matrix, W.shape), W)
    first = W[0].T if stack.transposed else W[0]
    assert torch.equal(matrix[:6], first)

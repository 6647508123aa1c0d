"""The fast path and its plain twin: values, gradients, gradients of gradients; what is kept; what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veneer.functional import dropout, lora_linear
from veneer.functional.dropout import dropped
from veneer.functional.lora_linear import frozen_linear, project
from veneer.functional.lowrank import update_linear

SCALE = 0.7


def drawn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def case(n: int = 2, *, bias: bool = True, x_grad: bool = True, leading: tuple[int, ...] = (2, 3)):
    """x, W, bias, A's and B's of n layers that read one input."""
    ranks = (2, 3, 1)[:n]
    x, W, b = drawn(*leading, 4, grad=x_grad), drawn(5, 4, grad=False), drawn(5) if bias else None
    return x, W, b, [drawn(r, 4) for r in ranks], [drawn(5, r) for r in ranks]


def fast(x, W, b, As, Bs, p=0.0):
    passed, hs = project(x, As, p)
    return [frozen_linear(passed, W, b, h, B, SCALE) for h, B in zip(hs, Bs, strict=True)]


def plain(x, W, b, As, Bs, p=0.0, seed=0):
    d = dropped(x, p, seed) / (1 - p) if p else x
    return [F.linear(x, W, b) + update_linear(d, A, B, SCALE) for A, B in zip(As, Bs, strict=True)]


@pytest.fixture
def one_seed(monkeypatch):
    monkeypatch.setattr(lora_linear, "new_seed", lambda: 5)
    return 5


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 3), max_size=3),
    st.tuples(*[st.integers(1, 6)] * 2),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_values_and_gradients_are_the_plain_twin_s(leading, size, ranks, bias, x_grad, seed):
    torch.manual_seed(seed)
    out, features = size
    x, W, b = drawn(*leading, features, grad=x_grad), drawn(out, features, grad=False), drawn(out) if bias else None
    As, Bs = [drawn(r, features) for r in ranks], [drawn(out, r) for r in ranks]
    leaves = [t for t in (x, b, *As, *Bs) if t is not None and t.requires_grad]
    gs = [drawn(*leading, out, grad=False) for _ in ranks]
    found = [f(x, W, b, As, Bs) for f in (fast, plain)]
    gradients = [torch.autograd.grad(ys, leaves, gs) for ys in found]
    for mine, twin in zip([*found[0], *gradients[0]], [*found[1], *gradients[1]], strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_twice(p, x_grad, bias, one_seed):
    x, W, b, As, Bs = case(bias=bias, x_grad=x_grad)

    def run(x, b, *factors):
        return tuple(fast(x, W, b, factors[:2], factors[2:], p))

    assert torch.autograd.gradcheck(run, (x, b, *As, *Bs))
    assert torch.autograd.gradgradcheck(run, (x, b, *As, *Bs))


@pytest.mark.parametrize("at_once", [2**19, 12])  # all rows, and three of them
@pytest.mark.parametrize(("leading", "x_grad"), [((20,), True), ((20,), False), ((4, 5), True), ((0,), True)])
def test_dropout_is_the_plain_formula_at_the_places_of_the_seed(leading, x_grad, at_once, one_seed, monkeypatch):
    monkeypatch.setattr(dropout, "_CACHED", at_once)
    x, W, b, As, Bs = case(leading=leading, x_grad=x_grad)
    ys, twins = fast(x, W, b, As, Bs, 0.3), plain(x, W, b, As, Bs, 0.3, one_seed)
    leaves = [t for t in (x, b, *As, *Bs) if t.requires_grad]
    gs = [torch.randn_like(y) for y in ys]
    assert not len(x) or not torch.allclose(ys[0], plain(x, W, b, As, Bs)[0])
    gradients = [torch.autograd.grad(found, leaves, gs) for found in (ys, twins)]
    for mine, twin in zip([*ys, *gradients[0]], [*twins, *gradients[1]], strict=True):
        torch.testing.assert_close(mine, twin)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_input_without_features(p):
    x, A = torch.zeros(3, 0, requires_grad=True), torch.zeros(2, 0, requires_grad=True)
    _, (h,) = project(x, [A], p)
    assert torch.equal(h, torch.zeros(3, 2))
    assert [g.shape for g in torch.autograd.grad(h.sum(), [x, A])] == [x.shape, A.shape]


def kept(run) -> list[Tensor]:
    """What is saved for backward, one of each storage."""
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return list(found.values())


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_nothing_is_kept_but_x_and_thin_things(p):
    tokens, rank = 50, 2
    x, W = drawn(tokens, 40), drawn(30, 40, grad=False)
    As, Bs = [drawn(rank, 40), drawn(rank, 40)], [drawn(30, rank), drawn(30, rank)]
    known = {t.data_ptr() for t in (x, W, *As, *Bs)}
    new = [t for t in kept(lambda: fast(x, W, None, As, Bs, p)) if t.untyped_storage().data_ptr() not in known]
    assert sum(t.untyped_storage().nbytes() for t in new) == tokens * 2 * rank * 8  # x A of both, in one tensor


def test_a_part_of_the_outputs_may_go_unused():
    x, W, b, As, Bs = case()
    ys, twins = fast(x, W, b, As, Bs), plain(x, W, b, As, Bs)
    mine = torch.autograd.grad(ys[1].sum(), [x, As[1], Bs[1], As[0]], allow_unused=True)
    twin = torch.autograd.grad(twins[1].sum(), [x, As[1], Bs[1], As[0]], allow_unused=True)
    assert mine[3] is None
    assert twin[3] is None
    for one, other in zip(mine[:3], twin[:3], strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_that_others_hold_are_not_written_into():
    x, W, b, As, Bs = case(1)
    y = F.relu(x)  # not a leaf, and with another reader, whose gradient must arrive whole
    held = []
    y.register_hook(lambda g: held.append((g, g.clone())))
    (out,) = fast(y, W, b, As, Bs)
    g = torch.randn_like(out)
    before = g.clone()
    torch.autograd.backward([out, y.sum()], [g, torch.ones((), dtype=torch.float64)])
    assert torch.equal(g, before)
    assert all(torch.equal(one, copy) for one, copy in held)


def test_the_graph_can_be_kept_and_run_again():
    x, W, b, As, Bs = case()
    total = sum(y.square().sum() for y in fast(x, W, b, As, Bs))
    first = torch.autograd.grad(total, [x, *As, *Bs], retain_graph=True)
    second = torch.autograd.grad(total, [x, *As, *Bs])
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_an_input_changed_before_backward_is_noticed():
    x, W, b, As, Bs = case(1)
    y = x * 1
    (out,) = fast(y, W, b, As, Bs)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_output_may_be_changed_in_place():
    x, W, b, As, Bs = case(1)
    (out,), (twin,) = fast(x, W, b, As, Bs), plain(x, W, b, As, Bs)
    out.mul_(2).relu_()
    twin = (twin * 2).relu()
    for one, other in zip(
        torch.autograd.grad(out.sum(), [x, *As, *Bs]), torch.autograd.grad(twin.sum(), [x, *As, *Bs]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_without_gradients_no_graph_is_made():
    x, W, b, As, Bs = case(2)
    with torch.no_grad():
        ys = fast(x, W, b, As, Bs)
    for y, twin in zip(ys, plain(x, W, b, As, Bs), strict=True):
        assert y.grad_fn is None
        torch.testing.assert_close(y, twin.detach())

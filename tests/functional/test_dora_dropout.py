import pytest
import torch
from torch import Tensor

from veneer.functional.dora_dropout import dora_dropped, dora_dropped_plainly, sparse_pays
from veneer.functional.dropped_elements import draw

W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SHAPES = {"x": (2, 5, 6), "bias": (4,), "A": (3, 6), "B": (4, 3), "g": (4,)}
UPDATE = {"scale": 0.7, "p": 0.3, "seed": 5}


@pytest.fixture(params=[True, False], ids=["sparse", "dense"], autouse=True)
def products(request, monkeypatch):
    monkeypatch.setitem(UPDATE, "sparse", request.param)


def inputs(*, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in SHAPES.values()]
    return [t.requires_grad_() if bias or name != "bias" else None for name, t in zip(SHAPES, drawn, strict=True)]


def fast(x, bias, A, B, g):
    return dora_dropped(x, W, bias, A, B, g, **UPDATE)


def plain(x, bias, A, B, g):
    return dora_dropped_plainly(x, bias, A, B, g, W, **UPDATE)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_its_plain_twin(bias):
    given = inputs(bias=bias)
    found, expected = fast(*given), plain(*given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [t for t in given if t is not None]
    cotangent = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(z, leaves, cotangent) for z in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_float32_is_as_near_to_float64_as_the_plain_twin():
    given = [t.detach().float().requires_grad_() for t in inputs()]
    leaves, cotangent = given, torch.randn(2, 5, 4)
    exact = [t.detach().double().requires_grad_() for t in given]
    z, true = dora_dropped(*given[:1], W.float(), *given[1:], **UPDATE), plain(*exact)
    torch.testing.assert_close(z.double(), true, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(z, leaves, cotangent)
    for one, other in zip(found, torch.autograd.grad(true, exact, cotangent.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias):
    assert torch.autograd.gradcheck(fast, inputs(bias=bias))
    assert torch.autograd.gradgradcheck(fast, inputs(bias=bias))


@pytest.mark.parametrize("wanted", list(SHAPES))
def test_gradients_of_one_input_alone(wanted):
    given = [t.requires_grad_(name == wanted) for name, t in zip(SHAPES, inputs(), strict=True)]
    assert torch.autograd.gradcheck(fast, given)


def test_a_gradient_that_is_no_dense_tensor():
    given = inputs()
    ours, theirs = (torch.autograd.grad(f(*given).sum(), given) for f in (fast, plain))  # an expanded one
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_only_one_tensor_of_the_outputs_size_is_kept_and_no_mask():
    x, bias, A, B, g = inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast(x, bias, A, B, g)
    own = [t for t in kept if t.data_ptr() not in {given.data_ptr() for given in (x, bias, A, B, g, W)}]
    assert sorted(t.shape for t in own if t.is_floating_point()) == [(10, 3), (10, 4)]  # h and W drop(x)
    places = [t.nbytes for t in own if not t.is_floating_point()]
    dropped = draw(10, 6, UPDATE["p"], UPDATE["seed"])
    assert places == ([4 * len(dropped.columns), 4 * 11] if UPDATE["sparse"] else [])


def test_bfloat16_is_as_near_to_float64_as_it_allows():
    UPDATE["sparse"] = False  # sparse products are of float32 and float64
    given = [t.detach().float().requires_grad_(name != "x") for name, t in zip(SHAPES, inputs(), strict=True)]
    x, bias = given[0].bfloat16().requires_grad_(), given[1].detach().bfloat16().requires_grad_()
    low, low_W = [x, bias, *given[2:]], W.bfloat16()
    exact = [t.detach().double().requires_grad_() for t in low]
    true = dora_dropped_plainly(*exact, low_W.double(), **UPDATE)
    found, plainly = dora_dropped(x, low_W, *low[1:], **UPDATE), dora_dropped_plainly(*low, low_W, **UPDATE)
    assert found.dtype == plainly.dtype == torch.bfloat16
    cotangent = torch.randn_like(found)
    theirs = torch.autograd.grad(true, exact, cotangent.double())
    for z in (found, plainly):
        torch.testing.assert_close(z.double(), true, rtol=0.02, atol=0.05)
        for one, leaf, other in zip(torch.autograd.grad(z, low, cotangent), low, theirs, strict=True):
            assert one.dtype == leaf.dtype
            torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_where_sparse_products_pay():
    long, short = torch.empty(4, 256, 8), torch.empty(4, 8)
    assert sparse_pays(long, 0.05)
    assert not sparse_pays(short, 0.05)
    assert not sparse_pays(long, 0.5)
    assert not sparse_pays(long.bfloat16(), 0.05)
    assert not sparse_pays(long.to("meta"), 0.05)


def test_the_output_may_be_changed_in_place():
    given = inputs()
    ours = torch.autograd.grad(fast(*given).relu_().sum(), given)
    for one, other in zip(ours, torch.autograd.grad(plain(*given).relu().sum(), given), strict=True):
        torch.testing.assert_close(one, other)

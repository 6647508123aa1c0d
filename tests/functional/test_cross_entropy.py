"""The chunked cross-entropy is its plain twin, forward, backward and twice backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.functional.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy

N, D, V = 7, 5, 11


def inputs(dtype: torch.dtype = torch.float64, *, bias: bool = True, trained: tuple[bool, bool] = (True, True)):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    W = torch.randn(V, D, generator=generator).to(dtype).requires_grad_(trained[0])
    b = torch.randn(V, generator=generator).to(dtype).requires_grad_(trained[1]) if bias else None
    return h, W, b, torch.randint(0, V, (N,), generator=generator)


def both(*given, chunk: int) -> list[list[torch.Tensor]]:
    """Loss and gradients, chunked and plain; the loss is divided as a mean over a step is."""
    found = []
    for loss in (linear_cross_entropy(*given, chunk=chunk), plain_linear_cross_entropy(*given)):
        wanted = [each for each in given[:3] if each is not None and each.requires_grad]
        found.append([loss, *torch.autograd.grad(loss / 5, wanted)])
    return found


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [(False, False), (True, False), (True, True)])
def test_loss_and_gradients_are_the_plain_ones(chunk: int, bias: bool, trained: tuple[bool, bool]) -> None:
    chunked, plain = both(*inputs(bias=bias, trained=trained), chunk=chunk)
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)]
)
def test_half_precision_sums_exponentials_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    given = inputs(dtype)
    chunked, plain = both(*given, chunk=3)
    assert chunked[0].dtype == torch.float32
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-6, atol=0)
    assert [each.dtype for each in chunked[1:]] == [dtype] * 3
    torch.testing.assert_close(chunked[1:], plain[1:], rtol=tolerance, atol=tolerance)


def test_large_logits_do_not_overflow() -> None:
    h, W, b, labels = inputs(torch.float32)
    h = (h.detach() * 1e4).requires_grad_()
    chunked, plain = both(h, W, b, labels, chunk=2)
    torch.testing.assert_close(chunked, plain)


def test_gradcheck_once_and_twice() -> None:
    h, W, b, labels = inputs()
    assert gradcheck(lambda *given: linear_cross_entropy(*given, labels, chunk=3), (h, W, b))
    assert gradgradcheck(lambda *given: linear_cross_entropy(*given, labels, chunk=3), (h, W, b))


def test_the_graph_may_be_used_twice() -> None:
    h, W, b, labels = inputs()
    loss = linear_cross_entropy(h, W, b, labels)
    (first,) = torch.autograd.grad(loss, h, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2, h)
    torch.testing.assert_close(second, first * 2)


def test_no_rows_are_no_loss() -> None:
    h, W, b, labels = inputs()
    loss = linear_cross_entropy(h[:0], W, b, labels[:0])
    loss.backward()
    assert loss == 0
    assert h.grad is not None
    assert not h.grad.any()


def test_a_view_of_the_rows_will_do() -> None:
    h, W, b, labels = inputs()
    turned = h.detach().T.contiguous().T.requires_grad_()
    assert not turned.is_contiguous()
    chunked, plain = both(turned, W, b, labels, chunk=3)
    torch.testing.assert_close(chunked, plain)


def test_under_autocast_and_compile_the_twin_runs() -> None:
    given = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear_cross_entropy(*given), plain_linear_cross_entropy(*given))
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), plain_linear_cross_entropy(*given))


class Widest(TorchDispatchMode):
    """The most numbers any one tensor holds, and the products with the head."""

    numel, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if isinstance(found, torch.Tensor):
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize(("learns", "products"), [(True, 2), (False, 1)])
def test_no_tensor_is_larger_than_a_chunk_of_logits(learns: bool, products: int) -> None:
    rows, vocabulary = 64, 100
    h, W = torch.randn(rows, D, requires_grad=True), torch.randn(vocabulary, D)
    labels = torch.randint(0, vocabulary, (rows,))
    with Widest() as seen, torch.set_grad_enabled(learns):
        loss = linear_cross_entropy(h, W, None, labels, chunk=8)
        if learns:
            torch.autograd.grad(loss, h)
    assert seen.numel <= max(8 * vocabulary, W.numel(), h.numel())
    assert seen.products == products * 8


def test_labels_beyond_the_vocabulary_are_refused() -> None:
    h, W, b, labels = inputs()
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(h, W, b, labels + V)


def test_the_twin_is_torch_own() -> None:
    h, W, b, labels = inputs()
    torch.testing.assert_close(
        plain_linear_cross_entropy(h, W, b, labels), F.cross_entropy(h @ W.T + b, labels, reduction="sum")
    )

"""Adapters multiplied together for all rows of a batch: the same as each by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.init import Factors
from veneer.layers.adapter import Adapter
from veneer.layers.attach import attach
from veneer.layers.kinds import LINEAR
from veneer.layers.lineup import alike
from veneer.layers.part import parts_of
from veneer.layers.route import Route
from veneer.layers.row_groups import Groups


def adapter(rank: int = 3, **options) -> Adapter:
    A, B = torch.randn(rank, 6), torch.randn(5, rank)
    return Adapter(LINEAR, Factors(A, B), **{"scale": 0.5, **options})


def layer_with(names: str, **special: Adapter) -> nn.Linear:
    torch.manual_seed(0)
    layer, route = nn.Linear(6, 5), Route()
    for name in names:
        attach(layer, name, special.get(name) or adapter(), route)
    return layer.double()


def row_by_row(layer: nn.Linear, names: list[str | None], x: torch.Tensor) -> torch.Tensor:
    rows = []
    times = len(x) // len(names)
    for i, row in enumerate(x):
        name = names[i // times]
        plan = () if name is None else (name,)
        with layer._veneer_route.following(plan, tuple(map(layer._veneer_route.step, plan))):
            rows.append(layer(row.unsqueeze(0)))
    return torch.cat(rows)


BATCHES = {
    "each row its own": list("abcd"),
    "equal shares": list("abcdabcd"),
    "uneven": list("abbbbbcd"),
    "in no order": list("dabacab"),
    "some get none": ["c", None, "a", "a", None, "b"],
    "one row each and many without": ["b", *[None] * 5, "a"],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("times", [1, 3])
def test_together_is_as_alone(batch, shape, times):
    names = BATCHES[batch]
    layer = layer_with("abcd")
    x = torch.randn(len(names) * times, *shape, dtype=torch.float64, requires_grad=True)
    expected = row_by_row(layer, names, x)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in [*layer.named_parameters(), ("x", x)]}
    x.grad = None
    layer.zero_grad()
    with layer._veneer_route.serving(parts_of(names)):
        found = layer(x)
    assert_close(found, expected, rtol=0, atol=1e-12)
    found.square().sum().backward()
    for name, p in [*layer.named_parameters(), ("x", x)]:
        assert_close(p.grad, gradients[name], rtol=0, atol=1e-10)


def unlike() -> dict[str, Adapter]:
    """Adapters of all forms that a linear layer can have, and none that is like another."""
    return {
        "b": adapter(2),
        "c": adapter(scale=2.0),
        "d": adapter(bias=torch.randn(5)),
        "e": adapter(magnitude=torch.rand(5) + 1),
        "f": adapter(start=Factors(torch.randn(3, 6), torch.randn(5, 3))),
        "g": adapter(5, magnitude=torch.rand(5) + 1, scale=0.3, start=Factors(torch.randn(5, 6), torch.randn(5, 5))),
        "h": adapter(1, scale=torch.tensor(0.7, dtype=torch.float64)),
    }


def gradients(layer: nn.Linear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in [*layer.named_parameters(), ("x", x)] if p.grad is not None}
    layer.zero_grad()
    x.grad = None
    return found


class Counted(TorchDispatchMode):
    """The products made within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("names", [[*"hfedcbag", None], "aabbccddeeffgghh", "hhhhhaaaebgcdf"])
@pytest.mark.parametrize("shape", [(6,), (4, 6)])
@pytest.mark.parametrize("biased", [True, False])
def test_unlike_ones_together_are_as_alone(names, shape, biased):
    layer = layer_with("abcdefgh", **unlike())
    if not biased:
        layer.bias = None
    assert len({alike(layer.adapters[name]) for name in "abcdefgh"}) == 1
    x = torch.randn(len(names), *shape, dtype=torch.float64, requires_grad=True)
    expected = row_by_row(layer, list(names), x)
    expected.square().sum().backward()
    wanted = gradients(layer, x)
    with layer._veneer_route.serving(parts_of(names)), Counted() as counted:
        found = layer(x)
    assert counted.products == 3 + 2  # the layer's own, two of all adapters, and two for norms
    assert_close(found, expected, rtol=0, atol=1e-12)
    found.square().sum().backward()
    given = gradients(layer, x)
    assert given.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(given[name], gradient, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad(), layer._veneer_route.serving(parts_of(names)):
        assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_gradients_of_gradients():
    layer = layer_with("abcdefgh", **unlike())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora" in name)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)

    def second(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(y.pow(3).sum(), [x, *trained], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *trained])

    names = [*"hfedcbag", None]
    expected = second(row_by_row(layer, names, x))
    with layer._veneer_route.serving(parts_of(names)):
        found = second(layer(x))
    for mine, alone in zip(found, expected, strict=True):
        assert_close(mine, alone, rtol=1e-9, atol=1e-9)


def test_as_many_products_for_many_adapters_as_for_few():
    names = "abcdefghijklmnop"
    layer = layer_with(names)
    x = torch.randn(16, 6, dtype=torch.float64)
    products = set()
    for count in (2, 4, 16):
        with (
            torch.no_grad(),
            layer._veneer_route.serving(parts_of(names[:count] * (16 // count))),
            Counted() as counted,
        ):
            layer(x)
        products.add(counted.products)
    assert products == {3}


def test_dropout_together_is_as_alone(monkeypatch):
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True: x * (x > 0) / (1 - p) if p else x)
    special = {"a": adapter(dropout=0.5), "b": adapter(2, dropout=0.5), "c": adapter(dropout=0.25)}
    layer = layer_with("abcde", **special, e=adapter(dropout=0.5, magnitude=torch.rand(5) + 1)).train()
    names, x = ["a", "b", "c", None, "d", "a", "e"], torch.randn(7, 3, 6, dtype=torch.float64, requires_grad=True)
    expected = row_by_row(layer, names, x)
    expected.square().sum().backward()
    wanted = gradients(layer, x)
    with layer._veneer_route.serving(parts_of(names)):
        found = layer(x)
    assert_close(found, expected, rtol=0, atol=1e-12)
    found.square().sum().backward()
    for name, gradient in gradients(layer, x).items():
        assert_close(gradient, wanted[name], rtol=0, atol=1e-10)


def test_dropout_is_drawn_for_each_row():
    layer = layer_with("ab", a=adapter(dropout=0.5), b=adapter(dropout=0.5)).train()
    x = torch.ones(40, 6, dtype=torch.float64)
    with layer._veneer_route.serving(parts_of("ab" * 20)):
        found = layer(x)
    assert len({tuple(row.tolist()) for row in found}) > 20


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("names", [["b", None, "a"], ["a", "b", "e"], [None, "d", "c"]])
def test_over_a_half_precision_layer(autocast, names):
    layer = layer_with("abcde", **{name: one for name, one in unlike().items() if name in "cde"})
    layer.to(torch.bfloat16)
    layer.adapters.float()
    x = torch.randn(3, 6).bfloat16()
    with torch.autocast("cpu", enabled=autocast), layer._veneer_route.serving(parts_of(names)):
        found = layer(x)
        with torch.no_grad():
            again = layer(x)
    assert found.dtype == again.dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=autocast):
        alone = row_by_row(layer, names, x)
    assert_close(found, alone, rtol=2e-2, atol=2e-2)
    assert_close(again, found, rtol=1e-2, atol=1e-2)


def test_adapters_in_half_precision():
    layer = layer_with("abcde", **{name: one for name, one in unlike().items() if name in "cde"}).to(torch.bfloat16)
    names, x = ["e", "d", None, "c", "a", "b"], torch.randn(6, 4, 6).bfloat16()
    with torch.no_grad(), layer._veneer_route.serving(parts_of(names)):
        assert_close(layer(x), row_by_row(layer, names, x), rtol=2e-2, atol=5e-2)


class Repeating(nn.Linear):
    """A layer that hands out one tensor again and again, which nobody may overwrite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = getattr(self, "last", None)
        if self.last is None:
            self.last = super().forward(x)
        return self.last


def test_an_output_that_others_have_is_not_overwritten():
    torch.manual_seed(0)
    layer, route = Repeating(6, 5), Route()
    for name in "ab":
        attach(layer, name, adapter(), route)
    x = torch.randn(2, 6)
    with torch.no_grad(), layer._veneer_route.serving(parts_of("ab")):
        one = layer(x).clone()
        kept = layer.last.clone()
        assert_close(layer(x), one, rtol=0, atol=0)
    assert torch.equal(layer.last, kept)


def test_indices_are_made_once_for_all_layers(monkeypatch):
    made = []
    monkeypatch.setattr(Groups, "of", lambda *args, of=Groups.of: made.append(1) or of(*args))
    one, two = layer_with("ab"), layer_with("ab")
    two._veneer_route = one._veneer_route
    x = torch.randn(3, 6, dtype=torch.float64)
    with one._veneer_route.serving(parts_of(["a", "b", None])):
        one(x), two(x), one(x)
    assert len(made) == 1


def test_an_adapter_that_one_layer_lacks():
    layer = layer_with("ab")
    x = torch.randn(3, 6, dtype=torch.float64)
    with layer._veneer_route.serving(parts_of(["a", "elsewhere", "b"])):
        found = layer(x)
    assert_close(found, row_by_row(layer, ["a", None, "b"], x), rtol=0, atol=1e-12)

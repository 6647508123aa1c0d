"""Adapters multiplied together for all rows of a batch: the same as each by itself."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from veneer.init import Factors
from veneer.layers.adapter import Adapter
from veneer.layers.attach import attach
from veneer.layers.by_rows import Groups, _alike
from veneer.layers.kinds import LINEAR
from veneer.layers.route import Route, parts_of


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


def test_unlike_ones_stay_alone():
    odd = {
        "b": adapter(2),
        "c": adapter(scale=2.0),
        "d": adapter(bias=torch.randn(5)),
        "e": adapter(magnitude=torch.rand(5) + 1),
        "f": adapter(start=Factors(torch.randn(3, 6), torch.randn(5, 3))),
    }
    layer = layer_with("abcdefgh", **odd)
    names = [*"hfedcbag", None]
    x = torch.randn(9, 6, dtype=torch.float64)
    with layer._veneer_route.serving(parts_of(names)):
        assert_close(layer(x), row_by_row(layer, names, x), rtol=0, atol=1e-12)
    assert [_alike(layer.adapters[name]) is None for name in "abcdefgh"] == [False] * 3 + [True] * 3 + [False] * 2
    assert len({_alike(layer.adapters[name]) for name in "abcgh"}) == 3


def test_dropout_is_not_shared():
    layer = layer_with("ab", a=adapter(dropout=0.9), b=adapter(dropout=0.9)).train()
    assert _alike(layer.adapters["a"]) is None
    assert _alike(layer.eval().adapters["a"]) is not None


@pytest.mark.parametrize("autocast", [False, True])
def test_over_a_half_precision_layer(autocast):
    layer = layer_with("ab")
    layer.to(torch.bfloat16)
    layer.adapters.float()
    names = ["b", None, "a"]
    x = torch.randn(3, 6).bfloat16()
    with torch.autocast("cpu", enabled=autocast), layer._veneer_route.serving(parts_of(names)):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert_close(found, row_by_row(layer, names, x), rtol=2e-2, atol=2e-2)


def test_indices_are_made_once_for_all_layers(monkeypatch):
    made = []
    monkeypatch.setattr(Groups, "of", lambda parts, device, of=Groups.of: made.append(1) or of(parts, device))
    one, two = layer_with("ab"), layer_with("ab")
    two._veneer_route = one._veneer_route
    x = torch.randn(3, 6, dtype=torch.float64)
    with one._veneer_route.serving(parts_of(["a", "b", None])):
        one(x), two(x), one(x)
    assert len(made) == 1


def test_free_places_are_few():
    names = ["a"] * 13 + ["b", "c", "d"] + [None] * 4
    groups = Groups.of(list(parts_of(names).values()), torch.device("cpu"))
    assert groups.size == 4
    assert len(groups.grid) <= 2 * 16
    assert groups.grid[groups.places].tolist() == list(range(16))

"""Which adapters are multiplied together, and that what is kept within a call never goes stale."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from veneer.init import Factors
from veneer.layers import lineup
from veneer.layers.adapter import Adapter
from veneer.layers.attach import attach, detach
from veneer.layers.kinds import LINEAR
from veneer.layers.lineup import Keeping, teams_of
from veneer.layers.part import Part, parts_of
from veneer.layers.route import Route


def adapter(rank: int = 3, *, size: int = 6, **options) -> Adapter:
    A, B = torch.randn(rank, size), torch.randn(size, rank)
    return Adapter(LINEAR, Factors(A, B), **{"scale": 0.5, **options})


def layer_with(names: str = "abc") -> nn.Linear:
    """A layer whose adapter b is DoRA."""
    torch.manual_seed(0)
    layer, route = nn.Linear(6, 6), Route()
    for name in names:
        attach(layer, name, adapter(magnitude=torch.rand(6) + 1 if name == "b" else None), route)
    return layer.eval()


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many adapters are in each stack that is made."""
    found: list[int] = []
    stacked = lineup.stacked

    def noted(adapters, *args, **named):
        found.append(len(adapters))
        return stacked(adapters, *args, **named)

    monkeypatch.setattr(lineup, "stacked", noted)
    return found


def serving(layer: nn.Linear, names, *, lasting: bool = True):
    return layer._veneer_route.serving(parts_of(names, lasting=lasting))


def ranks(*given: int, size: int = 6) -> list[list[int]]:
    served = [(adapter(rank, size=size), Part(9)) for rank in given]
    return [[len(one.lora_A) for one in team.adapters] for team in teams_of(served, 0.0)]


class TestTeams:
    def test_small_layers_are_one_team(self):
        assert ranks(2, 64, 8) == [[64, 8, 2]]

    def test_ranks_up_to_twice_are_one_team(self):
        assert ranks(*[64] * 20, *[32] * 20, size=2048) == [[64] * 20 + [32] * 20]

    def test_where_zeros_would_cost_more_than_a_product(self):
        assert ranks(8, 256, 4, 8, size=2048) == [[256], [8, 8, 4]]

    def test_a_start_counts_twice(self):
        one = adapter(3, start=Factors(torch.randn(3, 6), torch.randn(6, 3)))
        assert teams_of([(one, Part(9))], 0.0)[0].rank == 6


class TestKept:
    def test_stacks_are_made_once(self, made):
        layer, x = layer_with(), torch.randn(4, 1, 6)
        with torch.no_grad(), serving(layer, "abca"):
            first = layer(x)
            assert all(torch.equal(layer(x), first) for _ in range(3))
        assert made == [3]

    def test_only_where_a_call_runs_layers_again(self, made):
        layer, x = layer_with(), torch.randn(4, 1, 6)
        with torch.no_grad(), serving(layer, "abca", lasting=False):
            layer(x), layer(x)
        with serving(layer, "abca"):
            layer(x).sum().backward()
            layer(x).sum().backward()
        assert made == [3] * 4

    def test_in_training_mode_nothing_is_kept(self, made):
        layer, x = layer_with().train(), torch.randn(4, 1, 6)
        with torch.no_grad(), serving(layer, "abca"):
            layer(x), layer(x)
        assert made == [3, 3]

    def test_what_has_no_version_is_not_kept(self, made):
        with torch.inference_mode():
            layer = layer_with()
            x = torch.randn(4, 1, 6)
            with serving(layer, "abca"):
                before = layer(x).clone()
                layer.adapters["a"].lora_B.zero_()
                assert not torch.equal(layer(x), before)
        assert made == [3, 3]

    def test_let_go_at_the_end_of_the_call(self, monkeypatch):
        kept = []
        keep = Keeping.keep
        monkeypatch.setattr(
            Keeping, "keep", lambda self, team, new: kept.append(weakref.ref(new[1].A_GRI)) or keep(self, team, new)
        )
        layer = layer_with()
        with torch.no_grad(), serving(layer, "abca"):
            layer(torch.randn(4, 1, 6))
            assert kept[0]() is not None
        assert kept[0]() is None

    @pytest.mark.parametrize("room", [0, 500])
    def test_no_more_than_there_is_room_for(self, made, monkeypatch, room):
        layers, x = [layer_with() for _ in range(3)], torch.randn(4, 1, 6)
        for layer in layers:
            layer._veneer_route = layers[0]._veneer_route
        with torch.no_grad(), serving(layers[0], "aaca"):
            expected = [layer(x) for layer in layers]
        made.clear()
        monkeypatch.setattr(lineup, "KEPT_BYTES", room)
        parts = parts_of("aaca", lasting=True)
        with torch.no_grad(), layers[0]._veneer_route.serving(parts):
            for _ in range(2):
                assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
            keeping = parts["a"].shared("kept", Keeping)
            assert keeping.nbytes <= room
            assert keeping.nbytes == sum(
                team.kept[1].nbytes for one in keeping.lineups.values() for team in one.teams if team.kept
            )
        assert len(made) == (6 if room == 0 else 5)


def step(layer: nn.Linear) -> None:
    with torch.enable_grad():
        layer.adapters["a"].lora_B.square().sum().backward()
    torch.optim.SGD(layer.adapters.parameters(), lr=0.5).step()


def load(layer: nn.Linear) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def replace(layer: nn.Linear) -> None:
    layer.adapters["a"].lora_A = nn.Parameter(torch.randn(3, 6))


def readd(layer: nn.Linear) -> None:
    detach(layer, "a")
    attach(layer, "a", adapter(2), layer._veneer_route)


def train(layer: nn.Linear) -> None:
    layer.adapters["a"].dropout = 0.999999
    layer.train()


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "written to": lambda layer: layer.adapters["a"].lora_A.mul_(2),
    "a step of an optimizer": step,
    "loaded": load,
    "another parameter": replace,
    "added again under its name": readd,
    "taken off": lambda layer: detach(layer, "a"),
    "another scale": lambda layer: layer.adapters["a"].rescale(3.0),
    "the magnitude of DoRA": lambda layer: layer.adapters["b"].lora_magnitude_vector.add_(1),
    "the weight under DoRA": lambda layer: layer.weight.mul_(2),
    "training mode": train,
}


class TestChanges:
    @pytest.mark.parametrize("change", CHANGES)
    def test_within_a_call(self, change, monkeypatch):
        layer, x = layer_with(), torch.randn(4, 1, 6)
        with torch.no_grad(), serving(layer, "abca"):
            before = layer(x)
            CHANGES[change](layer)
            found = layer(x)
        with torch.no_grad(), serving(layer, "abca", lasting=False):
            assert_close(found, layer(x), rtol=0, atol=1e-2 if change == "training mode" else 1e-6)
        assert not torch.allclose(found, before)

    def test_a_scale_that_is_a_tensor(self):
        layer, x = layer_with(), torch.randn(4, 1, 6)
        layer.adapters["a"].scale = torch.tensor(0.5)
        with torch.no_grad(), serving(layer, "abca"):
            before = layer(x)
            layer.adapters["a"].rescale(1.0)
            found = layer(x)
        assert_close(found[0] - before[0], before[0] - layer_base(layer, x)[0])

    @pytest.mark.parametrize("change", [*CHANGES, "data", "other data"])
    def test_between_calls(self, change):
        def written(layer):
            layer.adapters["a"].lora_A.data.mul_(2)

        def assigned(layer):
            layer.adapters["a"].lora_A.data = torch.ones(3, 6)

        change_it = {**CHANGES, "data": written, "other data": assigned}[change]
        layer, x = layer_with(), torch.randn(4, 1, 6)
        found = []
        for _ in range(2):
            with torch.no_grad(), serving(layer, "abca"):
                found.append(layer(x))
            with torch.no_grad():
                if len(found) == 1:
                    change_it(layer)
        with torch.no_grad(), serving(layer, "abca", lasting=False):
            assert_close(found[1], layer(x), rtol=0, atol=1e-2 if change == "training mode" else 1e-6)
        assert not torch.allclose(*found)


def layer_base(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return nn.functional.linear(x, layer.weight, layer.bias)

"""The norms that DoRA divides by are those of the weights as they are now, whatever was done to them."""

import copy
import threading

import pytest
import torch
from torch import nn

import veneer
from veneer.functional import dora
from veneer.init import Factors
from veneer.layers import norms as norms_file
from veneer.layers.adapter import Adapter
from veneer.layers.attach import attach
from veneer.layers.kinds import kind_of
from veneer.layers.norms import norms
from veneer.layers.route import Route

IN, OUT, RANK = 7, 9, 3


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    kind = kind_of(layer)
    assert kind is not None
    factors = Factors(torch.randn(RANK, IN), torch.randn(OUT, RANK))
    start = Factors(torch.randn(RANK, IN), torch.randn(OUT, RANK))
    adapter = Adapter(kind, factors, scale=0.7, magnitude=torch.rand(OUT) + 0.5, start=start)
    route = Route()
    route.set(active=("a",))
    attach(layer, "a", adapter, route)
    return layer.eval()


@pytest.fixture
def computed(monkeypatch):
    """How often norms were computed."""
    calls, row_norms = [], dora.row_norms

    def counted(*args):
        calls.append(args)
        return row_norms(*args)

    monkeypatch.setattr(norms_file.dora, "row_norms", counted)
    return calls


def found(layer):
    with torch.no_grad():
        return norms(layer.adapters["a"], layer, layer.weight)


def true(layer):
    adapter = layer.adapters["a"]
    with torch.no_grad():
        return (layer.weight + adapter.delta(layer.weight.shape, layer.weight.dtype)).norm(dim=1)


def right(layer):
    torch.testing.assert_close(found(layer), true(layer), rtol=1e-5, atol=1e-6)


def step(layer):
    layer.train()
    optimizer = torch.optim.SGD(layer.adapters.parameters(), lr=0.5)
    layer(torch.randn(2, IN)).square().sum().backward()
    optimizer.step()
    layer.eval()


def data_step(layer):
    """As optimizers and DeepSpeed do that write through `.data`."""
    layer.train()
    layer(torch.randn(2, IN)).square().sum().backward()
    for parameter in (layer.adapters["a"].lora_A, layer.adapters["a"].lora_B):
        parameter.data[0, 0] += 1.0  # too little for a sample of numbers to notice
    layer.eval()


def swap(layer):
    torch.utils.swap_tensors(layer.adapters["a"].lora_B, nn.Parameter(torch.randn(OUT, RANK)))


def in_place(name):
    @torch.no_grad()
    def change(layer):
        layer.get_parameter(name).mul_(1.5)

    return change


def through_data(name):
    def change(layer):
        layer.get_parameter(name).data.mul_(1.5)

    return change


def one_row(layer):
    layer.weight.data[4] += 1.0


def one_column(layer):
    layer.weight.data[:, 2] += 1.0


def data_replaced(layer):
    layer.weight.data = torch.randn(OUT, IN)


CHANGES = {
    "optimizer": step,
    "optimizer through .data": data_step,
    "weight": in_place("weight"),
    "A": in_place("adapters.a.lora_A"),
    "B": in_place("adapters.a.lora_B"),
    "weight through .data": through_data("weight"),
    "A through .data": through_data("adapters.a.lora_A"),
    "B through .data": through_data("adapters.a.lora_B"),
    "start": lambda layer: layer.adapters["a"].start_B.mul_(0.5),
    "one row through .data": one_row,
    "one column through .data": one_column,
    "other data": data_replaced,
    "state dict": lambda layer: layer.load_state_dict({k: v + 0.5 for k, v in layer.state_dict().items()}),
    "state dict, assigned": lambda layer: layer.load_state_dict(
        {k: v + 0.5 for k, v in layer.state_dict().items()}, assign=True
    ),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(OUT, IN), False)),
    "scale": lambda layer: layer.adapters["a"].rescale(2.0),
    "swapped": swap,
    "dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_they_follow_every_change(layer, change):
    before = found(layer)
    change(layer)
    right(layer)
    assert not torch.equal(found(layer), before)


def test_nothing_is_computed_twice_in_evaluation(layer, computed):
    x = torch.randn(2, IN)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), first)
    assert len(computed) == 1


def test_what_was_computed_in_inference_mode_can_be_used_after_it(layer):
    x = torch.randn(2, IN)
    with torch.inference_mode():
        expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), [x])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("mode", ["train", "eval with gradients"])
def test_training_computes_them_each_time(layer, computed, mode):
    layer.train(mode == "train")
    for _ in range(2):
        layer(torch.randn(2, IN))
    assert len(computed) == 2
    if mode == "train":  # the first forward of a reentrant checkpoint
        with torch.no_grad():
            layer(torch.randn(2, IN))
        assert len(computed) == 3


def test_parameters_made_in_inference_mode_count_no_changes(layer):
    adapter = layer.adapters["a"]
    with torch.inference_mode():
        adapter.lora_B = nn.Parameter(torch.randn(OUT, RANK))
        right(layer)
        adapter.lora_B[0, 1] += 1.0
        right(layer)


def test_a_copy_has_its_own(layer):
    found(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.adapters["a"].lora_A.mul_(3.0)
    right(other)
    right(layer)


def test_they_end_with_their_adapter(layer):
    found(layer)
    kept = len(norms_file._KEPT)
    del layer.adapters["a"]
    assert len(norms_file._KEPT) == kept - 1


def test_merging_and_unmerging():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN))
    config = veneer.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True, init_lora_weights=False)
    model, x = veneer.get_peft_model(base, config).eval(), torch.randn(4, IN)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            model.merge_adapter()
            torch.testing.assert_close(model(x), expected)
            model.unmerge_adapter()
            torch.testing.assert_close(model(x), expected)


def test_two_threads_and_changes(layer):
    """Each call sees the weights before or after a change, never a mixture with older norms."""
    x, allowed, wrong = torch.randn(2, IN), [], []
    values = [torch.randn(OUT, RANK) for _ in range(2)]
    with torch.no_grad():
        for value in values:
            layer.adapters["a"].lora_B.copy_(value)
            allowed.append(layer(x))

    def call():
        with torch.no_grad():
            for _ in range(100):
                z = layer(x)
                if not any(torch.allclose(z, one) for one in allowed):
                    wrong.append(z)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""One layer whose weight accelerate keeps elsewhere. Whole models are in tests/model/test_offload.py."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, offload_state_dict
from torch import nn

from veneer.layers.weights import home, is_offloaded, kept, put_back, read, store_of, write
from veneer.layers.weights.offloaded import Replaced, Resident, settle

CPU = torch.device("cpu")


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def hooked(*maps) -> nn.Linear:
    """The layer with an offloading hook for each map of values; None: one of the hook's own."""
    made = layer()
    for values in maps:
        hook = AlignDevicesHook(execution_device=CPU, offload=True, weights_map=values)
        add_hook_to_module(made, hook, append=True)
    return made


def in_memory() -> dict[str, torch.Tensor]:
    return {f"some.{name}": value for name, value in layer().state_dict().items()}


def maps(folder) -> dict:
    offload_state_dict(folder, in_memory())
    return {
        "own": None,
        "dict": layer().state_dict(),
        "prefixed": PrefixedDataset(in_memory(), "some."),
        "loader": PrefixedDataset(OffloadedWeightsLoader(state_dict=in_memory()), "some."),
        "disk": PrefixedDataset(OffloadedWeightsLoader(save_folder=folder), "some."),
    }


@pytest.mark.parametrize("kind", ["own", "dict", "prefixed", "loader", "disk"])
def test_a_new_value_and_the_old_one_again(kind, tmp_path):
    found = hooked(maps(tmp_path)[kind])
    x, W = torch.randn(2, 4), layer().weight.detach()
    assert is_offloaded(found)
    assert found.weight.is_meta
    assert store_of(found).name == "offloaded"
    assert home(found) == CPU
    assert torch.equal(read(found), W)
    before, originals = found(x), {name: kept(found, name) for name in ("weight", "bias")}
    files = sorted(path.name for path in tmp_path.iterdir())
    write(found, "weight", W + 1)
    write(found, "bias", torch.zeros(3))
    assert found.weight.is_meta
    assert torch.equal(found(x), nn.functional.linear(x, W + 1))
    for name, original in originals.items():
        put_back(found, name, original)
    assert torch.equal(found(x), before)
    assert not isinstance(found._hf_hook.weights_map, Replaced)
    assert files == sorted(path.name for path in tmp_path.iterdir())
    write(found, "weight", W + 1)
    remove_hook_from_module(found)
    assert torch.equal(found.weight, W + 1)
    put_back(found, "weight", originals["weight"])
    assert torch.equal(found.weight, W)


def test_of_several_hooks_all_are_told():
    found, W = hooked(None, layer().state_dict()), layer().weight.detach()
    assert isinstance(found._hf_hook, SequentialHook)
    original = kept(found)
    write(found, "weight", 2 * W)
    assert torch.equal(read(found), 2 * W)
    put_back(found, "weight", original)
    assert torch.equal(read(found), W)
    write(found, "weight", 2 * W)
    remove_hook_from_module(found)
    assert torch.equal(found.weight, 2 * W)


def test_a_value_is_read_in_the_dtype_of_the_layer():
    values = {name: value.double() for name, value in layer().state_dict().items()}
    assert read(hooked(values)).dtype == torch.float32


def test_an_original_outlives_another_dispatch():
    found, W = hooked(None), layer().weight.detach()
    original = kept(found)
    write(found, "weight", 2 * W)
    remove_hook_from_module(found)
    add_hook_to_module(found, AlignDevicesHook(execution_device=CPU, offload=True))
    put_back(found, "weight", original)
    assert torch.equal(read(found), W)
    plain = kept(layer())
    put_back(found, "weight", plain)
    assert torch.equal(read(found), W)


def test_hooks_that_keep_nothing_elsewhere_are_no_offloading():
    found = layer()
    add_hook_to_module(found, AlignDevicesHook(execution_device=CPU))
    assert not is_offloaded(found)
    assert store_of(found).name == "dense"


class Kept(Resident):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))
        self.register_buffer("frozen", torch.ones(3))

    def forward(self, x: torch.Tensor, other: nn.Module) -> torch.Tensor:
        return x * self.weight * self.frozen


def test_a_resident_stays_and_moves_nothing_it_is_given():
    stays = Kept()
    add_hook_to_module(stays, AlignDevicesHook(execution_device=CPU, offload=True, offload_buffers=True), append=True)
    assert torch.equal(stays.weight, torch.arange(3.0))
    assert stays.weight.requires_grad
    elsewhere = nn.Linear(2, 2, device="meta")
    stays(torch.ones(3), elsewhere).sum().backward()
    assert torch.equal(stays.weight.grad, torch.ones(3))
    remove_hook_from_module(stays)
    assert torch.equal(stays.weight, torch.arange(3.0))


def test_settling_keeps_the_parameters_that_an_optimizer_holds():
    found, W = hooked(None), layer().weight.detach()
    held = found.weight
    settle(found)
    assert found.weight is held
    assert torch.equal(held, W)
    assert not {"_hf_hook", "_old_forward", "forward"} & vars(found).keys()
    found(torch.ones(1, 4)).sum().backward()
    assert held.grad is not None

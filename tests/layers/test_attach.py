"""Changing what a layer is, and changing it back."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer.errors import AttachError
from veneer.init import Factors
from veneer.layers.adapter import Adapter
from veneer.layers.attach import Adapted, attach, detach
from veneer.layers.kinds import LINEAR
from veneer.layers.route import Route
from veneer.layers.swap import base_class, made_class


def an_adapter(layer: nn.Linear, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(rank, layer.in_features, generator=generator)
    B = torch.randn(layer.out_features, rank, generator=generator)
    return Adapter(LINEAR, Factors(A, B), scale=0.5)


def adapted(layer: nn.Linear | None = None) -> nn.Linear:
    layer = layer or nn.Linear(4, 3)
    route = Route()
    route.set(active=("a",))
    attach(layer, "a", an_adapter(layer), route)
    return layer


def test_the_layer_computes_the_plain_formula():
    layer = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    before = layer(x)
    adapter = an_adapter(layer).double()
    route = Route()
    route.set(active=("a",))
    attach(layer, "a", adapter, route)
    torch.testing.assert_close(layer(x), before + 0.5 * x @ adapter.lora_A.T @ adapter.lora_B.T)


def test_the_layer_stays_what_it_was():
    layer = nn.Linear(4, 3)
    weight = layer.weight
    adapted(layer)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, Adapted)
    assert layer.weight is weight
    assert list(layer.state_dict()) == ["weight", "bias", "adapters.a.lora_A", "adapters.a.lora_B"]


def test_a_plain_checkpoint_loads_after_attaching():
    layer = adapted()
    missing = layer.load_state_dict(nn.Linear(4, 3).state_dict(), strict=False).missing_keys
    assert missing == ["adapters.a.lora_A", "adapters.a.lora_B"]


def test_detaching_the_last_adapter_leaves_nothing():
    layer = nn.Linear(4, 3)
    names = set(vars(layer))
    adapted(layer)
    attach(layer, "b", an_adapter(layer), layer._veneer_route)
    detach(layer, "a")
    assert isinstance(layer, Adapted)
    detach(layer, "b")
    assert type(layer) is nn.Linear
    assert set(vars(layer)) == names
    assert "adapters" not in layer._modules


def test_the_class_is_made_once():
    assert made_class(Adapted, nn.Linear) is made_class(Adapted, nn.Linear)
    assert base_class(adapted()) is nn.Linear
    assert base_class(nn.Linear(1, 1)) is nn.Linear


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_work_and_share_nothing(clone):
    layer = adapted()
    twin = clone(layer)
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), layer(x))
    twin._veneer_route.set(enabled=False)
    assert not torch.equal(twin(x), layer(x))


def test_torch_save_of_a_whole_layer():
    layer = adapted()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(2, 4)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


def test_layers_of_a_copied_model_share_the_copys_route():
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(target_modules=["q_proj"]))
    tiny.shake(model)
    twin = copy.deepcopy(model)
    twin.base_model.disable_adapter_layers()
    x = tiny.ids()
    assert not torch.equal(twin(x).logits, model(x).logits)


def test_a_keyword_input_reaches_the_adapter():
    layer = adapted()
    x = torch.randn(2, 4)
    assert torch.equal(layer(input=x), layer(x))


def test_a_patched_forward_is_refused():
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: x
    with pytest.raises(AttachError, match="replaced on the instance"):
        adapted(layer)
    model = tiny.Stack()
    model.first.forward = model.second.forward
    with pytest.raises(AttachError):
        veneer.get_peft_model(model, veneer.LoraConfig(target_modules=["first", "second"]))
    assert type(model.second) is nn.Linear


def test_accelerates_hook_is_kept_and_sees_the_adapter():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    layer, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(layer.state_dict())
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    x = torch.randn(2, 4)
    adapted(layer)
    expected = adapted(plain)(x)
    assert torch.equal(layer(x), expected)
    detach(layer, "a")
    detach(plain, "a")
    assert torch.equal(layer(x), plain(x))
    remove_hook_from_module(layer)
    assert torch.equal(layer(x), plain(x))


def test_attaching_after_compile_is_noticed():
    layer = nn.Linear(4, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 4)
    plain = compiled(x)
    adapted(layer)
    with_adapter = compiled(x)
    assert torch.equal(with_adapter, layer(x))
    assert not torch.equal(with_adapter, plain)
    layer._veneer_route.set(enabled=False)
    assert torch.equal(compiled(x), plain)

"""EVA's components and ranks against PEFT's, over a whole model and over made-up numbers."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from init.oracle import matrix
from veneer.config.sub_configs import EvaConfig
from veneer.errors import ConfigError
from veneer.init.rank_spread import EvaComponents, alpha_for, fingerprint, shared_inputs, spread_ranks


class Small(nn.Module):
    """Two layers with one input, and two behind them."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 12)
        self.k = nn.Linear(16, 12)
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 8)
        for i, layer in enumerate([self.q, self.k, self.up, self.down]):
            layer.weight.data = 3 * matrix(*layer.weight.shape, seed=i, decay=0.8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(torch.tanh(self.q(x)) * self.k(x))))


NAMES = ("q", "k", "up", "down")


def loader(count=8):
    scales = 0.8 ** torch.arange(16)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(60, 16, generator=generator) * scales for _ in range(count)]


def theirs(model, rank, eva, **fields):
    from peft.tuners.lora.config import EvaConfig as TheirConfig

    config = peft.LoraConfig(
        r=rank, target_modules=list(NAMES), init_lora_weights="eva", eva_config=TheirConfig(**eva), **fields
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        peft.initialize_lora_eva_weights(
            adapted,
            dataloader=loader(),
            forward_fn=lambda model, x: model(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    return adapted.base_model.model


def inputs_of(model, x):
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, given, __, name=name: found.update({name: given[0]}))
        for name in NAMES
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def ours(model, ranks, eva):
    data = loader()
    same = shared_inputs({name: fingerprint(x) for name, x in inputs_of(model, data[0]).items()})
    features = {name: model.get_submodule(name).in_features for name in NAMES}
    found = EvaComponents(ranks, features, settings=eva, same_input=same)
    for step in range(200):
        if not found.waiting():
            break
        inputs = inputs_of(model, data[step % len(data)])
        for name in found.waiting():
            found.update(name, inputs[name])
        found.end_of_batch()
    return found.result()


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize(("rank", "rho"), [(2, 1.0), (2, 2.0), (4, 1.5), (3, 3.0)])
def test_a_model_gets_peft_s_ranks_components_and_scales(rank, rho, whiten, adjust):
    from veneer.init import Weight, initialise

    eva = {"rho": rho, "tau": 0.95, "whiten": whiten, "adjust_scaling_factors": adjust}
    model, settings = Small(), EvaConfig(**eva)
    adapted = theirs(model, rank, eva, lora_alpha=6)
    found = ours(model, dict.fromkeys(NAMES, rank), settings)
    assert sum(len(c.vectors) for c in found.values()) == rank * len(NAMES)
    for name in NAMES:
        layer, new = adapted.get_submodule(name), len(found[name].vectors)
        if new == 0:
            assert isinstance(layer, nn.Linear)
            continue
        assert layer.r["default"] == new
        scale = alpha_for(6, rank, new, settings=settings) / new
        assert layer.scaling["default"] == pytest.approx(scale)
        factors = initialise("eva", Weight.of(layer.base_layer.weight), new, options=settings, stats=found[name])
        A = layer.lora_A["default"].weight.detach()
        if whiten and name in ("q", "k"):
            # PEFT divides in place, once for each layer with this input, and both layers get the same memory.
            both = min(len(found["q"].vectors), len(found["k"].vectors))
            A[:both] *= found[name].singular_values[:both, None].sqrt()
        torch.testing.assert_close(factors.A, A, rtol=0.01, atol=0.01)
        assert torch.equal(factors.B, layer.lora_B["default"].weight)


def test_ranks_go_where_they_explain_most():
    ratios = {"a": torch.tensor([0.5, 0.3, 0.1]), "b": torch.tensor([0.9, 0.02, 0.01]), "c": torch.tensor([0.04, 0.03])}
    assert spread_ranks(ratios, 3) == {"a": 2, "b": 1, "c": 0}
    assert spread_ranks(ratios, 8) == {"a": 3, "b": 3, "c": 2}
    assert spread_ranks(ratios, 100) == {"a": 3, "b": 3, "c": 2}


def test_of_layers_with_one_input_the_measured_one_comes_first():
    ratios = {"q": torch.tensor([0.6, 0.2])}
    assert spread_ranks(ratios, 3, same_input={"k": "q"}) == {"q": 2, "k": 1}


def test_layers_with_one_input_are_found():
    x = torch.randn(4, 3)
    tensors = {"q": x, "k": x.clone(), "other": x + 1, "shape": x.view(3, 4), "dtype": x.double(), "v": x.T.T}
    assert shared_inputs({name: fingerprint(t) for name, t in tensors.items()}) == {"k": "q", "v": "q"}
    assert fingerprint(x.bfloat16()) == fingerprint(x.bfloat16())


def test_rho_is_bounded_by_the_number_of_features():
    found = EvaComponents({"a": 8}, {"a": 10}, settings={"rho": 1000.0})
    assert found.ranks == {"a": 10}
    found.update("a", torch.randn(50, 10))
    assert found.waiting() == ["a"]


def test_a_layer_is_waited_for_until_its_components_settle():
    found = EvaComponents({"a": 2, "b": 2}, {"a": 6, "b": 6}, settings={"tau": 0.9, "rho": 1.0})
    X = torch.randn(60, 6) * 0.5 ** torch.arange(6)
    assert not found.update("a", X[:1])  # too few rows
    for _ in range(2):
        assert found.update("a", X)
    found.end_of_batch()
    assert found.waiting() == ["b"]
    with pytest.raises(ConfigError, match="1 of 2 layers .b, .*lower tau"):
        found.result()
    for _ in range(2):
        found.update("b", X)
    found.end_of_batch()
    assert found.waiting() == []
    assert {name: c.vectors.shape for name, c in found.result().items()} == {"a": (2, 6), "b": (2, 6)}


def test_an_error_names_the_layer():
    found = EvaComponents({"model.q": 2}, {"model.q": 6})
    with pytest.raises(ConfigError, match=r"model\.q: .*NaN"):
        found.update("model.q", torch.full((9, 6), float("nan")))


@pytest.mark.parametrize(("adjust", "alpha"), [(True, 12.0), (False, 8)])
def test_alpha_follows_the_rank_or_not(adjust, alpha):
    assert alpha_for(8, 4, 6, settings=EvaConfig(adjust_scaling_factors=adjust)) == alpha
    assert alpha_for(8, 4, 4, settings=EvaConfig(adjust_scaling_factors=adjust)) == 8

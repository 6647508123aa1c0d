"""Every method but the plain random ones, against PEFT on the same layer: factors, product, what is left of W."""

import dataclasses
import sys
import types

import peft
import pytest
import torch
from torch import nn

from init.oracle import config, injected, matrix, one_layer, seeded
from veneer.config.sub_configs import CordaConfig, LoraGAConfig
from veneer.init import Weight, initialise
from veneer.init.covariance import Covariance
from veneer.init.mean_gradient import MeanGradient

SHAPES = [(24, 40), (40, 24), (32, 32)]
SCALES = [{"lora_alpha": 8}, {"lora_alpha": 16, "use_rslora": True}, {"lora_alpha": 3}]


def close(ours, theirs, *, tolerance=2e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def compare(ours, theirs, W):
    """Factors up to the sign of each component, products and residual weights as they are."""
    signs = (ours.A * theirs.A).sum(1).sign()
    close(ours.A * signs[:, None], theirs.A)
    close(ours.B * signs, theirs.B)
    close(ours.B @ ours.A, theirs.B @ theirs.A)
    assert ours.subtract
    close(W - theirs.scale * ours.B @ ours.A, theirs.base)


@pytest.mark.parametrize("fields", SCALES)
@pytest.mark.parametrize("rank", [1, 8, 24])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora(init, shape, rank, fields):
    W = matrix(*shape)
    theirs = injected(one_layer(W), config(rank, init, **fields))
    compare(initialise(init, Weight.of(W), rank, scale=theirs.scale), theirs, W)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("niter", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_by_random_projections(shape, niter, seed, monkeypatch):
    W, name = torch.randn(*shape), f"pissa_niter_{niter}"
    seeded(monkeypatch, "pissa_init", seed)
    theirs = injected(one_layer(W), config(4, name, lora_alpha=8))
    ours = initialise(name, Weight.of(W), 4, scale=theirs.scale, generator=torch.Generator().manual_seed(seed))
    compare(ours, theirs, W)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 8])
def test_orthogonal(shape, rank, monkeypatch):
    W = matrix(*shape)
    seeded(monkeypatch, "orthogonal_init", 3)
    theirs = injected(one_layer(W), config(rank, "orthogonal"))
    ours = initialise("orthogonal", Weight.of(W), rank, generator=torch.Generator().manual_seed(3))
    close(ours.A, theirs.A)
    close(ours.B, theirs.B)
    assert torch.equal(theirs.base, W)
    assert not ours.subtract


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8])
def test_mica(shape, rank):
    W = matrix(*shape)
    theirs = injected(one_layer(W), config(rank, "mica"))
    ours = initialise("mica", Weight.of(W), rank)
    assert torch.equal(ours.A, torch.zeros(rank, shape[1]))
    assert torch.equal(theirs.A, ours.A)
    close(ours.B * (ours.B * theirs.B).sum(0).sign(), theirs.B, tolerance=1e-4)
    assert theirs.trained == (True, False)
    assert ours.frozen == ("B",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_half_precision_is_worked_on_in_float32(init, dtype):
    W = matrix(24, 40).to(dtype)
    ours = initialise(init, Weight.of(W), 4)
    assert ours.A.dtype == ours.B.dtype == torch.float32
    model = one_layer(W)
    theirs = injected(model, config(4, init, lora_alpha=4))
    close(ours.A.to(dtype).abs(), theirs.A.abs(), tolerance=torch.finfo(dtype).eps)
    close(ours.B.to(dtype).abs(), theirs.B.abs(), tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("fields", SCALES)
@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_corda(shape, method, fields, monkeypatch):
    stand_in = types.ModuleType("attr")  # PEFT's corda.py imports it without declaring it
    stand_in.dataclass = dataclasses.dataclass
    monkeypatch.setitem(sys.modules, "attr", stand_in)
    from peft.tuners.lora.config import CordaConfig as TheirConfig
    from peft.tuners.lora.corda import preprocess_corda

    W, model = matrix(*shape), one_layer(matrix(*shape))
    inputs = [torch.randn(1, 200, shape[1], generator=torch.Generator().manual_seed(i)) for i in range(3)]
    settings = config(4, "corda", corda_config=TheirConfig(corda_method=method), **fields)
    model[0].weight.requires_grad_(False)
    preprocess_corda(model, settings, run_model=lambda: [model(x) for x in inputs])
    theirs = injected(model, settings)
    covariance = Covariance(shape[1])
    for x in inputs:
        covariance.update(x)
    options, stats = CordaConfig(corda_method=method), covariance.mean()
    ours = initialise("corda", Weight.of(W), 4, scale=theirs.scale, options=options, stats=stats)
    compare(ours, theirs, W)


@pytest.mark.parametrize("fields", SCALES[:2])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_lora_ga(shape, direction, scale, fields, monkeypatch):
    from peft.tuners.lora.loraga import preprocess_loraga

    W, model = matrix(*shape), one_layer(matrix(*shape))
    batches = [torch.randn(50, shape[1], generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2)]
    options = {"direction": direction, "scale": scale, "stable_gamma": 9}
    settings = config(4, "lora_ga", lora_ga_config=peft.LoraGAConfig(**options), **fields)
    preprocess_loraga(model, settings, lambda: [model(x).square().sum().backward() for x in batches])
    gradient = MeanGradient(*shape)
    for x in batches:
        plain = one_layer(W)
        plain(x).square().sum().backward()
        gradient.update(plain[0].weight.grad)
    close(gradient.mean(), model[0]._peft_loraga_grad, tolerance=1e-4)
    seeded(monkeypatch, "lora_ga_init", 5)
    theirs = injected(model, settings)
    ours = initialise(
        "lora_ga",
        Weight.of(W),
        4,
        scale=theirs.scale,
        options=LoraGAConfig(**options),
        stats=gradient.mean(),
        generator=torch.Generator().manual_seed(5),
    )
    size = theirs.B.abs().max()
    close(ours.A, theirs.A)
    close(ours.B / size, theirs.B / size)
    close((W - theirs.scale * ours.B @ ours.A) / theirs.base.abs().max(), theirs.base / theirs.base.abs().max())
    assert ours.subtract


def test_where_peft_silently_makes_a_lower_rank():
    """PEFT gives factors of rank 4 to an adapter of rank 6, and its scale no longer goes with them."""
    theirs = injected(nn.Sequential(nn.Linear(4, 10)), config(6, "pissa"))
    assert theirs.A.shape == (4, 4)

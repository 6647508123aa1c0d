"""PEFT's own initialisation of one linear layer, whose numbers ours are compared with."""

import warnings
from dataclasses import dataclass

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


@dataclass(frozen=True)
class Theirs:
    """What PEFT made: the factors, the scale, and what it left of the base weight."""

    A: Tensor
    B: Tensor
    scale: float
    base: Tensor
    trained: tuple[bool, bool]


def matrix(out: int, into: int, *, seed: int = 0, decay: float = 0.9) -> Tensor:
    """A matrix whose singular values are apart, so that its singular vectors are well defined."""
    generator = torch.Generator().manual_seed(seed)
    size = min(out, into)
    U = torch.linalg.qr(torch.randn(out, size, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(into, size, generator=generator, dtype=torch.float64)).Q
    return ((U * decay ** torch.arange(size, dtype=torch.float64)) @ V.T).float()


def one_layer(W_OI: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(W_OI.shape[1], W_OI.shape[0], bias=False))
    model[0].weight.data = W_OI.clone()
    return model


def config(rank: int, init: object, **fields: object) -> peft.LoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=init, **fields)


def injected(model: nn.Sequential, settings: peft.LoraConfig) -> Theirs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = peft.inject_adapter_in_model(settings, model)[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Theirs(
        A.detach(),
        B.detach(),
        layer.scaling["default"],
        layer.base_layer.weight.detach(),
        (A.requires_grad, B.requires_grad),
    )


def seeded(monkeypatch, method: str, seed: int) -> None:
    """Let PEFT's own initialisation start from a seed, whatever was drawn before it."""
    original = getattr(LoraLayer, method)

    def wrapper(self, *args, **kwargs):
        torch.manual_seed(seed)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, method, wrapper)

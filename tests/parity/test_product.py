"""The whole product of kind × rule × scale × initialisation × bias that PEFT supports, on one layer each.

Made by PEFT, shaken, saved; read here: outputs, gradients, merged weights; written here, read there.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import tiny
import veneer
from parity import oracle
from veneer.model.tensors import adapter_tensors

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


class One(nn.Module):
    """The layer that is adapted, and one beside it whose bias only bias="all" trains."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.after = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y if y.dim() < 4 and not isinstance(self.layer, nn.modules.conv._ConvNd) else y.flatten(2).transpose(1, 2)
        return self.after(torch.tanh(y))


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


KINDS: dict[str, tuple[Callable[[], One], Callable[[], Tensor]]] = {
    "linear": (lambda: One(nn.Linear(8, 6), 6), lambda: seeded(2, 5, 8)),
    "linear-without-bias": (lambda: One(nn.Linear(6, 8, bias=False), 8), lambda: seeded(4, 6)),
    "conv1d-of-gpt2": (lambda: One(Conv1D(6, 8), 6), lambda: seeded(2, 5, 8)),
    "embedding": (
        lambda: One(nn.Embedding(9, 6, padding_idx=1), 6),
        lambda: torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(5)),
    ),
}
RULES = {"lora": {}, "dora": {"use_dora": True}}
SCALES = {"plain": {}, "rslora": {"use_rslora": True}}
INITS = [True, False, "gaussian", "orthogonal", "pissa", "olora", "mica"]
BIASES = {
    "none": {},
    "all": {"bias": "all"},
    "lora-only": {"bias": "lora_only"},
    "of-its-own": {"lora_bias": True},
    "of-its-own-and-all": {"lora_bias": True, "bias": "all"},
}


def supported(kind: str, rule: str, init: Any, bias: str) -> bool:
    """What PEFT, and so this test, can do."""
    own = bias.startswith("of-its-own")
    if own and (rule == "dora" or not isinstance(init, bool) or kind == "embedding"):
        return False
    if (rule, init) == ("dora", "mica") or (bias == "lora-only" and kind in ("linear-without-bias", "embedding")):
        return False
    if (kind, init) == ("conv1d-of-gpt2", "olora"):
        return False  # PEFT makes factors of the transposed weight, and fails in forward
    return kind != "embedding" or isinstance(init, bool)


CASES = [
    pytest.param(
        kind,
        {**RULES[rule], **SCALES[scale], **BIASES[bias], "init_lora_weights": init},
        id=f"{kind}-{rule}-{scale}-{init}-{bias}",
    )
    for kind, rule, scale, init, bias in itertools.product(KINDS, RULES, SCALES, INITS, BIASES)
    if supported(kind, rule, init, bias)
]


def made(kind: str) -> tuple[One, Tensor]:
    torch.manual_seed(0)
    build, inputs = KINDS[kind]
    return build().eval(), inputs()


def can_merge(base: One, fields: dict[str, Any]) -> bool:
    return not fields.get("lora_bias") or getattr(base.layer, "bias", None) is not None


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_equal_to_peft(kind, fields, tmp_path):
    base, x = made(kind)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **fields}
    if kind.startswith("conv1d-of"):
        fields["fan_in_fan_out"] = True
    theirs = tiny.shake(oracle.made_by_peft(base, **fields)).eval()
    ours = veneer.PeftModel.from_pretrained(
        copy.deepcopy(base), oracle.save(theirs, tmp_path / "theirs"), is_trainable=True
    ).eval()
    expected, found = theirs(x), ours(x)
    assert not torch.allclose(expected, base(x), atol=1e-3), "the adapter does nothing: a void test"
    assert_close(found, expected, **CLOSE)

    for y in (expected, found):
        y.square().sum().backward()
    tensors = adapter_tensors(ours.bare, "default")
    by_storage = {p.data_ptr(): p.grad for p in ours.bare.parameters() if p.requires_grad}
    for key, gradient in oracle.gradients(theirs).items():
        assert_close(by_storage[tensors[key].data_ptr()], gradient, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")

    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert_close(oracle.read_by_peft(base, tmp_path / "ours").eval()(x), expected, **CLOSE)
        if can_merge(base, fields):
            merged = oracle.quietly(theirs.merge_and_unload).state_dict()
            for key, value in ours.merge_and_unload().state_dict().items():
                assert_close(value, merged[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_the_product_is_large():
    assert len(CASES) > 200

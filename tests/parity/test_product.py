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
        self.convolves = isinstance(layer, nn.modules.conv._ConvNd)
        self.after = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.convolves:
            y = y.flatten(2).transpose(1, 2)
        return self.after(torch.tanh(y))


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


KINDS: dict[str, tuple[Callable[[], One], Callable[[], Tensor]]] = {
    "linear": (lambda: One(nn.Linear(8, 6), 6), lambda: seeded(2, 5, 8)),
    "linear-without-bias": (lambda: One(nn.Linear(6, 8, bias=False), 8), lambda: seeded(4, 6)),
    "conv1d-of-gpt2": (lambda: One(Conv1D(6, 8), 6), lambda: seeded(2, 5, 8)),
    "conv1d": (lambda: One(nn.Conv1d(3, 6, 3, stride=2, padding=1), 6), lambda: seeded(2, 3, 9)),
    "conv2d": (lambda: One(nn.Conv2d(3, 6, 3, padding=1), 6), lambda: seeded(2, 3, 5, 4)),
    "conv3d": (lambda: One(nn.Conv3d(2, 6, 2, bias=False), 6), lambda: seeded(2, 2, 3, 3, 4)),
    "conv2d-in-groups": (lambda: One(nn.Conv2d(4, 6, 3, groups=2), 6), lambda: seeded(2, 4, 5, 5)),
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


WITHOUT_BIAS = ("linear-without-bias", "conv3d", "embedding")
NO_MATRIX = ("conv1d", "conv2d", "conv3d", "conv2d-in-groups", "embedding")


def supported(kind: str, rule: str, init: Any, bias: str) -> bool:
    """What PEFT, and so this test, can do."""
    own = bias.startswith("of-its-own")
    impossible = [
        own and (rule == "dora" or not isinstance(init, bool) or kind == "embedding"),
        (rule, init) == ("dora", "mica"),
        bias == "lora-only" and kind in WITHOUT_BIAS,
        kind in NO_MATRIX and not isinstance(init, bool),
        (kind, rule) == ("conv2d-in-groups", "dora"),  # PEFT's norm is that of no weight; refused here
        (kind, init) == ("conv1d-of-gpt2", "olora"),  # PEFT makes factors of the transposed weight, and fails
    ]
    return not any(impossible)


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
    biased = getattr(base.layer, "bias", None) is not None
    return getattr(base.layer, "groups", 1) == 1 and (biased or not fields.get("lora_bias"))


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
        mine = by_storage[tensors[key].data_ptr()].view_as(gradient)
        assert_close(mine, gradient, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")

    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert_close(oracle.read_by_peft(base, tmp_path / "ours").eval()(x), expected, **CLOSE)
        if can_merge(base, fields):
            merged = oracle.quietly(theirs.merge_and_unload).state_dict()
            for key, value in ours.merge_and_unload().state_dict().items():
                assert_close(value, merged[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_the_product_is_large():
    assert len(CASES) > 200

"""A layer in each form that its weight can be kept in by a library that quantises, for the tests."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

OUT, IN = 64, 128


def weight(rows: int = OUT, columns: int = IN) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    """The libraries replace layers inside a model."""

    def __init__(self, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(weight())
            if bias:
                self.layer.bias.copy_(torch.linspace(-1, 1, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _bnb(make: str, **options) -> Callable[[Holder], nn.Module]:
    def quantised(holder: Holder) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        old = holder.layer
        layer = getattr(bnb.nn, make)(IN, OUT, bias=old.bias is not None, **options)
        layer.load_state_dict(old.state_dict())
        return layer.to(old.weight.dtype).to("cpu")

    return quantised


def _torchao(name: str, **options) -> Callable[[Holder], nn.Module]:
    def quantised(holder: Holder) -> nn.Module:
        ao = pytest.importorskip("torchao.quantization")
        from torchao.quantization.granularity import PerAxis, PerGroup

        groups = {"group": PerGroup(32), "row": PerAxis(0)}
        settings = {k: groups[v] if k.endswith("granularity") else v for k, v in options.items()}
        ao.quantize_(holder, getattr(ao, name)(**settings))
        return holder.layer

    return quantised


def _quanto(name: str) -> Callable[[Holder], nn.Module]:
    def quantised(holder: Holder) -> nn.Module:
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(holder, weights=getattr(quanto, name))
        quanto.freeze(holder)
        return holder.layer

    return quantised


FORMS: dict[str, Callable[[Holder], nn.Module]] = {
    "bnb int8": _bnb("Linear8bitLt", has_fp16_weights=False),
    "bnb nf4": _bnb("Linear4bit", quant_type="nf4", compress_statistics=False),
    "bnb nf4 twice": _bnb("Linear4bit", quant_type="nf4", compress_statistics=True),
    "bnb fp4": _bnb("Linear4bit", quant_type="fp4", compress_statistics=False),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 in groups": _torchao("Int8WeightOnlyConfig", granularity="group"),
    "torchao int4": _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity="group"),
    "torchao int4 scales in bf16": _torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity="row", scale_dtype=torch.bfloat16
    ),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
    "quanto int8": _quanto("qint8"),
    "quanto float8": _quanto("qfloat8"),
}
ROUNDS_INPUTS: dict[str, Callable[[Holder], nn.Module]] = {
    "torchao int8 both": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4 and inputs": _torchao(
        "Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4, weight_granularity="group"
    ),
}


def made(form: str, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A linear layer of 128 inputs and 64 outputs in this form, frozen, in evaluation."""
    layer = {**FORMS, **ROUNDS_INPUTS}[form](Holder(bias, dtype))
    return layer.requires_grad_(False).eval()

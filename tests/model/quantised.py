"""A tiny Llama as transformers loads it in each of the ways to quantise that run here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
)

import tiny
import veneer


def _torchao(name: str, **options: Any) -> TorchAoConfig:
    ao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    if "weight_dtype" in options:
        options["granularity"] = PerGroup(32)
    return TorchAoConfig(getattr(ao, name)(**options))


def _bnb(**options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def _quanto(weights: str) -> QuantoConfig:
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights=weights)


METHODS: dict[str, Callable[[], Any]] = {
    "bnb int8": lambda: _bnb(load_in_8bit=True),
    "bnb nf4": lambda: _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "torchao int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao int4": lambda: _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": lambda: _torchao("Float8WeightOnlyConfig"),
    "quanto int8": lambda: _quanto("int8"),
}


def save_base(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def loaded(folder: Path, method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = METHODS[method]()
    return AutoModelForCausalLM.from_pretrained(folder, device_map="auto", quantization_config=config, dtype=dtype)


def config(**fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


def adapted(base: nn.Module, **fields) -> veneer.PeftModel:
    return veneer.get_peft_model(base, config(**fields), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny.ids()).logits

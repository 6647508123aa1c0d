"""One tiny random model of each architecture that people fine-tune, with an input for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import tiny

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Family:
    """How to build a model and what to feed it. `some` are a few of its layers, as people name them."""

    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    some: list[str]

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return self.build().eval()


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": tiny.ids()}


def _pairs() -> dict[str, Tensor]:
    return {"input_ids": tiny.ids(), "decoder_input_ids": tiny.ids(tokens=4)}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


def _sound() -> dict[str, Tensor]:
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(5))
    return {"input_features": sound, "decoder_input_ids": tiny.ids(rows=2, tokens=4)}


def _whisper() -> PreTrainedModel:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 20, "max_target_positions": 20}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=64, d_model=32, **heads, **sizes, **tokens, **lengths)
    )


def _t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, dropout_rate=0, decoder_start_token_id=0))


def _vit() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3))


def _albert() -> PreTrainedModel:
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AlbertForMaskedLM(AlbertConfig(vocab_size=64, **sizes, intermediate_size=48, max_position_embeddings=32))


FAMILIES = {
    "llama": Family(tiny.llama, _tokens, ["q_proj", "v_proj"]),
    "mixtral": Family(
        lambda: MixtralForCausalLM(MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)),
        _tokens,
        ["q_proj", "v_proj"],
    ),
    "qwen2-moe": Family(
        lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**_DECODER, **_EXPERTS, shared_expert_intermediate_size=40)),
        _tokens,
        ["q_proj", "shared_expert.up_proj"],
    ),
    "qwen3-moe": Family(
        lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_DECODER, **_EXPERTS, head_dim=8)), _tokens, ["q_proj", "o_proj"]
    ),
    "gpt2": Family(tiny.gpt2, _tokens, ["c_attn", "c_fc"]),
    "bert": Family(tiny.bert, _tokens, ["query", "value"]),
    "t5": Family(_t5, _pairs, ["q", "v", "wo"]),
    "vit": Family(_vit, _image, ["q_proj", "fc1"]),
    "whisper": Family(_whisper, _sound, ["q_proj", "fc2"]),
    "albert": Family(_albert, _tokens, ["query", "ffn"]),
}


def logits(model: Any, family: Family) -> Tensor:
    """What the model answers to the family's input."""
    return model(**family.inputs()).logits

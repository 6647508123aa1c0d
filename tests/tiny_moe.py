"""Mixtures of experts small enough to build in a test, whose experts are stacked in parameters."""

import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral(**changes) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, **changes)).eval()


def qwen2_moe() -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=12)
    return Qwen2MoeForCausalLM(config).eval()


def qwen3_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=12, head_dim=8)).eval()


def gpt_oss() -> GptOssForCausalLM:
    """Experts stored as (E, in, out), with biases."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, head_dim=8)).eval()
    return model


def llama4() -> Llama4ForCausalLM:
    """Experts stored as (E, in, out), which their class does not say."""
    torch.manual_seed(0)
    config = Llama4TextConfig(**SMALL, num_local_experts=4, intermediate_size_mlp=24, head_dim=8)
    return Llama4ForCausalLM(config).eval()


class Experts(nn.Module):
    """Every expert sees every input: y = Σ_e down_e · tanh(up_e x) + table x, with a helper that reads too."""

    def __init__(self, experts: int = 3, *, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(experts, 6, 4, generator=generator))
        self.down = nn.Parameter(torch.randn(experts, 4, 6, generator=generator))
        self.table = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.scales = nn.Parameter(torch.randn(4, generator=generator))
        if transposed:
            self.up.data, self.down.data = self.up.data.mT.contiguous(), self.down.data.mT.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return sum((self._expert(x, e) for e in range(len(self.up))), x @ self.table.T)

    def _expert(self, x: Tensor, e: int) -> Tensor:
        up, down = (self.up[e].T, self.down[e].T) if self.is_transposed else (self.up[e], self.down[e])
        return torch.tanh(x @ up.T) @ down.T


class Block(nn.Module):
    """A linear layer, experts, and a linear layer."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.experts = Experts(**kwargs)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x)))

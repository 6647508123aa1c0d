"""Llama-shaped models with one base in memory and any number of adapted copies over it, and their training step.

The weights are random: no time here depends on their values. Every contender's step is the same: forward, and
backward down to the input, which has a gradient for all of them; no optimizer step, but A and B count as changed
after each step, so that nothing which depends on them alone can be kept from the step before.
"""

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from benchmarks.harness import Contender

LIBRARIES = {"PEFT": "peft", "Veneer": "veneer"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS: dict[str, dict[str, bool]] = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}


@dataclass(frozen=True)
class Shape:
    """A Llama: its sizes, and whether it ends in a head over a vocabulary (0: it ends in hidden states)."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int = 0

    @property
    def linear(self) -> int:
        """Weights of the adapted projections of one layer."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.mlp

    def adapter(self, rank: int) -> int:
        """Weights of the adapters of one layer."""
        kv = self.hidden * self.kv_heads // self.heads
        return rank * (4 * self.hidden + 2 * (self.hidden + kv) + 3 * (self.hidden + self.mlp))


TINY = Shape("a tiny model", 64, 96, 4, 2, 2)
SMOLLM2_LAYERS = Shape("two layers of SmolLM2's shape", 576, 1536, 9, 3, 2)
SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 9, 3, 30, vocabulary=49152)
LLAMA_7B_LAYERS = Shape("two layers of Llama-7B's shape", 4096, 11008, 32, 32, 2)


def base(shape: Shape, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model, frozen and in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary or 8,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        use_cache=False,
    )
    kind: Any = LlamaForCausalLM if shape.vocabulary else LlamaModel
    with torch.device(device):
        return kind(config).to(dtype).train().requires_grad_(False)


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the model over the same memory, its parameters frozen."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def adapted(
    library: str,
    model: nn.Module,
    *,
    rank: int = 16,
    dropout: float = 0.0,
    method: str = "LoRA",
    targets: tuple[str, ...] = PROJECTIONS,
) -> nn.Module:
    """The model with an adapter of this library ("PEFT", "Veneer") on these layers."""
    module = importlib.import_module(LIBRARIES[library])
    settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout, **METHODS[method]}
    made = module.get_peft_model(model, module.LoraConfig(target_modules=list(targets), **settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return made.train()


@dataclass(frozen=True)
class Work:
    """What goes through a model in one step: random hidden states in, and for a head random labels."""

    shape: Shape
    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def setting(self) -> dict[str, Any]:
        """For a table's `setting`."""
        return {
            "model": self.shape.name,
            "batch": f"{self.batch} × {self.tokens} tokens",
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def base(self) -> nn.Module:
        """The model, frozen."""
        return base(self.shape, dtype=self.dtype, device=self.device)

    def input(self) -> Tensor:
        """What the embedding would give, asking for a gradient."""
        x = torch.randn(self.batch, self.tokens, self.shape.hidden, device=self.device)
        return x.to(self.dtype).requires_grad_()

    def backward(self, model: nn.Module, x: Tensor) -> None:
        """Forward, and backward down to x."""
        if self.shape.vocabulary:
            labels = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2]) % self.shape.vocabulary
            model(inputs_embeds=x, labels=labels).loss.backward()
        else:
            y = model(inputs_embeds=x).last_hidden_state
            y.backward(torch.ones_like(y))


def step(model: nn.Module, work: Work) -> Contender:
    """Forward and backward. Before each, the gradients go and the adapters count as changed, as after an optimizer."""
    x = work.input()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]

    def prepare() -> Tensor:
        x.grad = None
        model.zero_grad()
        with torch.no_grad():
            for parameter in adapters:
                parameter.add_(0)
        return x

    return Contender(lambda x: work.backward(model, x), prepare)


def forward_only(model: nn.Module, work: Work) -> Contender:
    """Forward without anything kept for a backward."""
    x = work.input().detach()

    def run() -> None:
        with torch.no_grad():
            model(inputs_embeds=x)

    return Contender(run)

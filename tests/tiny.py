"""Models small enough to build in a test, random but fixed, and ready-made inputs for them."""

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def llama(*, tied: bool = False, layers: int = 2, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
        max_position_embeddings=32,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return BertForSequenceClassification(config).eval()


class Stack(nn.Module):
    """An embedding, linear layers with and without bias, and norms: no library between the test and the layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 16, padding_idx=0)
        self.first = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.second = nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.tokens(ids)))
        return self.head(torch.tanh(self.second(self.norm(x))))


def ids(vocabulary: int = 64, rows: int = 3, tokens: int = 7) -> Tensor:
    return torch.randint(1, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(5))


def shake(model: nn.Module, *, seed: int = 3, std: float = 0.2) -> nn.Module:
    """Give every trainable parameter random values, so that nothing is zero by chance of initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise, alpha=std)
    return model

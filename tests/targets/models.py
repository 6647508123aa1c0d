"""Structures to resolve names against: no weights, so every one is on the meta device."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
SMALL_BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
}
T5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)


class Nested(nn.Module):
    """Names that end alike: one is inside a list of layers, one at the top, one in a list within a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4), "act": nn.ReLU()}) for _ in range(3))
        self.body.experts = nn.ModuleList(
            nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])}) for _ in range(2)
        )
        self.act = nn.ModuleDict({"fc": nn.Identity()})


class Twice(nn.Module):
    """Lists of one name within each other, and a name that is a layer at the top and within."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(
            nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(2))})
            for _ in range(3)
        )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 8)


MAKERS = {
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "llama body": lambda: LlamaModel(LLAMA),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
    "bert classifier": lambda: BertForSequenceClassification(BertConfig(**SMALL_BERT)),
    "bert tagger": lambda: BertForTokenClassification(BertConfig(**SMALL_BERT)),
    "bert reader": lambda: BertForQuestionAnswering(BertConfig(**SMALL_BERT)),
    "bert filler": lambda: BertForMaskedLM(BertConfig(**SMALL_BERT)),
    "roberta classifier": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL_BERT)),
    "t5": lambda: T5ForConditionalGeneration(T5),
    "nested": Nested,
    "twice": Twice,
    "attention": Attention,
}


def skeleton(name: str) -> nn.Module:
    with torch.device("meta"):
        return MAKERS[name]()


def materialised(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]()

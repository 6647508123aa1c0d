"""Random models of some ten thousand parameters, saved like any other: what `--tiny` puts in the place of a real one.

Each function returns a folder for `from_pretrained`. Texts are read byte by byte, so any text will do.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

PAD, TURN, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
WORDS = 3 + 256
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPEECH = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>")


@cache
def causal_lm() -> str:
    """A Llama of two layers with a chat template."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,  # a frozen head of tiny numbers could say nothing
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _save(transformers.LlamaForCausalLM, config, _tokenizer())


@cache
def seq2seq() -> str:
    """A T5 of two layers on each side."""
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _save(transformers.T5ForConditionalGeneration, config, _tokenizer())


@cache
def encoder() -> str:
    """A BERT of two layers, without a head."""
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return _save(transformers.BertModel, config, _tokenizer())


@cache
def vision() -> str:
    """A ViT of two layers for pictures of 16 × 16 pixels."""
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return _save(transformers.ViTModel, config, transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}))


@cache
def speech() -> str:
    """A Whisper of one layer on each side that listens for one second."""
    vocabulary = {word: at for at, word in enumerate([*sorted(ByteLevel.alphabet()), *SPEECH])}
    words = transformers.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=32,
        num_mel_bins=80,
        pad_token_id=vocabulary["<|endoftext|>"],
        bos_token_id=vocabulary["<|endoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        decoder_start_token_id=vocabulary["<|startoftranscript|>"],
    )
    ears = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    processor = transformers.WhisperProcessor(feature_extractor=ears, tokenizer=words)
    return _save(transformers.WhisperForConditionalGeneration, config, processor)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {token: at for at, token in enumerate([PAD, TURN, END, *sorted(ByteLevel.alphabet())])}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = ByteLevelDecoder()
    inner.add_special_tokens([AddedToken(token, special=True) for token in (PAD, TURN, END)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=PAD)
    made.chat_template = CHAT
    return made


def _save(kind: type, config: transformers.PreTrainedConfig, reads: Any) -> str:
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kind(config).save_pretrained(folder)
    reads.save_pretrained(folder)
    return str(folder)

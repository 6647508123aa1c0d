"""What a training run takes, by arithmetic: bytes of each part in memory, and bytes that cross the wires in a step.

    weights       the base as it is kept, and its buffers; in shards 1/n of it, and the layers at work as a whole
    adapters      in float32
    gradients     of the adapters
    optimizer     Adam's two numbers for each of the adapters
    activations   what autograd keeps of a batch, and what is at work besides
    logits        the loss's, a chunk at a time

Shapes: B rows in a batch, T tokens in a row, D width, F width of the MLP, L layers, V vocabulary, R rank.
Bytes, all of one device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from veneer.functional.cross_entropy import CHUNK_BYTES, CHUNK_BYTES_ELSEWHERE

Keeping = Literal["float32", "bfloat16", "int8", "nf4", "fp4"]
Profile = Literal["ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"]

PROFILES: tuple[Profile, ...] = ("ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3")
OPTIMIZER_NUMBERS = 2  # Adam's, for each number that is trained
_BLOCK, _OUTER_BLOCK = 64, 256  # bitsandbytes: numbers with one largest number, and such numbers with one of theirs
_CODE_4, _CODE_8 = 16 * 4, 256 * 4  # its tables of a weight: 16 float32 values, and 256 where it quantises twice


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of Llama's kind. `tied`: the head is the embedding."""

    name: str
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def llama_config(self) -> dict[str, Any]:
        """What transformers' `LlamaConfig` takes to make it."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "tie_word_embeddings": self.tied,
        }

    @property
    def head_width(self) -> int:
        """Numbers of one head."""
        return self.width // self.heads

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers in one decoder layer: q, k, v, o, gate, up, down."""
        D, kv = self.width, self.kv_heads * self.head_width
        return [(D, D), (D, kv), (D, kv), (D, D), (D, self.mlp), (D, self.mlp), (self.mlp, D)]

    @property
    def of_a_layer(self) -> int:
        """Numbers in the linear weights of one decoder layer."""
        return sum(inputs * outputs for inputs, outputs in self.projections)

    @property
    def beside(self) -> int:
        """Numbers that no quantisation rounds: embedding, head and norms."""
        heads = self.vocabulary * self.width * (1 if self.tied else 2)
        return heads + self.width * (2 * self.layers + 1)

    @property
    def parameters(self) -> int:
        """Numbers of the whole model.

        >>> SMOLLM2_135M.parameters
        134515008
        """
        return self.layers * self.of_a_layer + self.beside

    def adapters(self, rank: int) -> int:
        """Numbers of a LoRA over every linear layer but the head.

        >>> SMOLLM2_135M.adapters(16)
        4884480
        """
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.projections)


SMOLLM2_135M = Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, tied=True)
LLAMA_8B = Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = Shape("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128256)
LLAMA_405B = Shape("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128256)


@dataclass(frozen=True, slots=True)
class Run:
    """What is trained: a batch of so many rows of so many tokens on each device.

    checkpointing  keeps one value for each layer and token, and computes a layer's others again
    computes       bytes of a number in activations
    """

    shape: Shape
    keeping: Keeping = "bfloat16"
    rank: int = 16
    rows: int = 1
    tokens: int = 1024
    checkpointing: bool = False
    computes: int = 2
    on_cpu: bool = False

    @property
    def adapters(self) -> int:
        """Numbers that are trained."""
        return self.shape.adapters(self.rank)


def linear_bytes(numbers: int, outputs: int, keeping: Keeping) -> int:
    """Bytes of one linear weight of `outputs` rows: the numbers, and the scales that they were rounded with.

    >>> linear_bytes(576 * 576, 576, "int8") - 576 * 576  # a float32 for each row
    2304
    """
    if keeping in ("float32", "bfloat16"):
        return numbers * (4 if keeping == "float32" else 2)
    if keeping == "int8":
        return numbers + 4 * outputs
    blocks = -(-numbers // _BLOCK)
    if keeping == "fp4":
        return numbers // 2 + 4 * blocks + _CODE_4
    outer = -(-blocks // _OUTER_BLOCK)
    return numbers // 2 + blocks + 4 * outer + 4 + _CODE_4 + _CODE_8


def layer_bytes(shape: Shape, keeping: Keeping) -> int:
    """Bytes of the linear weights of one decoder layer."""
    return sum(linear_bytes(inputs * outputs, outputs, keeping) for inputs, outputs in shape.projections)


def weight_bytes(shape: Shape, keeping: Keeping) -> int:
    """Bytes of the base's parameters. Beside rounded weights, all else is float32, as for k-bit training."""
    each = 2 if keeping == "bfloat16" else 4
    return shape.layers * layer_bytes(shape, keeping) + shape.beside * each


def kept_by_a_layer(run: Run) -> int:
    """Bytes that autograd keeps of one decoder layer without checkpointing.

    For each token: what both norms got and scaled, in float32, and gave, which q, k and v share, and gate and up; q, k
    and v as the attention got them and what it made of them, which is o's input; gate, what the activation makes of it,
    up, and their product, which is down's input; for each of the seven projections x A; and a few single numbers.
    """
    shape = run.shape
    kv = shape.kv_heads * shape.head_width
    wide = 2 * shape.width + 2 * (shape.width + kv) + 4 * shape.mlp + 7 * run.rank
    singles = 4 * (2 * shape.width + shape.heads + 2)
    return run.rows * run.tokens * (wide * run.computes + singles)


def activation_bytes(run: Run) -> int:
    """Bytes kept between forward and backward: of every layer, or with checkpointing of one and the inputs of all."""
    layers = run.shape.layers
    of_a_token = run.shape.width * run.computes
    after = 2 * run.rows * run.tokens * of_a_token  # the head's inputs and their gradient
    copies = run.adapters * run.computes if run.computes < 4 else 0  # of the adapters in the dtype of the inputs
    if not run.checkpointing:
        return layers * kept_by_a_layer(run) + after + copies
    return layers * run.rows * run.tokens * of_a_token + kept_by_a_layer(run) + after + copies // layers


def logit_bytes(run: Run, *, all_at_once: bool = False) -> int:
    """Bytes of the logits that are there at once: a chunk in float32, and in the dtype of the model beside it.

    all_at_once  of every token, as transformers' own loss takes them: with their softmax and its gradients in float32
    """
    tokens, each = run.rows * run.tokens, 4 if run.computes == 4 else 4 + run.computes
    if all_at_once:
        return tokens * run.shape.vocabulary * (12 + run.computes)
    chunk = CHUNK_BYTES["cpu"] if run.on_cpu else CHUNK_BYTES_ELSEWHERE
    return min(tokens, max(1, chunk // (run.shape.vocabulary * 4))) * run.shape.vocabulary * each


def memory(run: Run, profile: Profile | None = None, devices: int = 1) -> dict[str, int]:
    """Bytes of each part on one device.

    profile  None: one device by itself, as ddp on one
    """
    shards_base = profile in ("fsdp2", "deepspeed-zero3")
    weights = weight_bytes(run.shape, run.keeping)
    if shards_base and devices > 1:
        at_once = 2 * layer_bytes(run.shape, run.keeping)  # the layer at work and the next, gathered ahead of time
        # head and norm stay whole from the forward pass to the backward
        ends = run.shape.vocabulary * run.shape.width * (2 if run.keeping == "bfloat16" else 4)
        weights = weights // devices + at_once + ends
    trained = 4 * run.adapters
    adapters = trained // devices if shards_base else trained
    gradients = adapters if profile != "deepspeed-zero2" else trained // devices
    shared = devices if profile not in (None, "ddp") else 1
    # DeepSpeed steps a copy of what is trained
    copies = 4 * run.adapters // shared if profile in ("deepspeed-zero2", "deepspeed-zero3") else 0
    return {
        "weights": weights,
        "adapters": adapters,
        "gradients": gradients,
        "optimizer": OPTIMIZER_NUMBERS * trained // shared + copies,
        "activations": activation_bytes(run),
        "logits": logit_bytes(run, all_at_once=profile == "deepspeed-zero3"),
    }


def traffic(run: Run, profile: Profile, devices: int) -> int:
    """Bytes that each device sends in a step of one batch.

    A ring sends (n - 1)/n of a tensor to gather or to scatter it, twice that to add it up everywhere. Gradients are
    those of the adapters alone, in float32; a base in shards is gathered for the forward pass and for the backward.
    """
    if devices == 1:
        return 0
    trained = 4 * run.adapters
    whole = weight_bytes(run.shape, run.keeping) + trained
    sent = {
        "ddp": 2 * trained,
        "deepspeed-zero2": 2 * trained,  # gradients scattered, new values gathered
        "fsdp2": 2 * whole + trained,
        "deepspeed-zero3": 2 * whole + trained,
    }[profile]
    return sent * (devices - 1) // devices


def total(parts: Mapping[str, int]) -> int:
    """Bytes of all parts together."""
    return sum(parts.values())

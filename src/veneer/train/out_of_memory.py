"""What to say when memory runs out in training: what was being run, what would need less, and how to go on.

Nearly all that a batch needs are the values kept for the backward pass, which grow with its rows times its tokens.
The adapter, its gradients and the optimizer's two numbers for each are small beside them.
"""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

import torch

from veneer.errors import RunError, bullet_list
from veneer.train.resume import CHECKPOINTS, SETTINGS_FILE, complete_checkpoints
from veneer.train.settings import RunConfig

Phase = Literal["the forward pass", "the backward pass", "the optimizer's step", "the evaluation"]

# how allocators other than CUDA's say it: those of the CPU, of Apple's and Intel's devices, of the libraries on CUDA
_SAID = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_OF_A_TRAINED_NUMBER = 12  # bytes beside the number itself: its gradient and Adam's two, in float32
_SHORTEST = 64  # tokens, below which shorter rows are no advice


@dataclass(frozen=True)
class Batch:
    """The shape of a batch, padding included."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows} row{'s' * (self.rows != 1)} of {self.tokens:,} tokens"

    @property
    def size(self) -> int:
        """Rows times tokens."""
        return self.rows * self.tokens


@dataclass
class Doing:
    """What a trainer is at, and the largest batch that went through a whole step so far."""

    phase: Phase = "the forward pass"
    batch: Batch | None = None
    largest: Batch | None = None
    evaluates: bool = False

    def begin(self, input_ids: torch.Tensor, *, evaluates: bool = False) -> None:
        """A batch (B, T) begins."""
        self.batch, self.evaluates = Batch(*input_ids.shape), evaluates
        self.phase = "the evaluation" if evaluates else "the forward pass"

    def forward_done(self) -> None:
        """What a training batch does next is its backward pass."""
        if not self.evaluates:
            self.phase = "the backward pass"

    def done(self) -> None:
        """The batch went through."""
        if self.batch is not None and (self.largest is None or self.batch.size > self.largest.size):
            self.largest = self.batch
        self.phase = "the optimizer's step"


@dataclass(frozen=True)
class Room:
    """Memory, in bytes: all that the device has, and what the model takes."""

    device: str
    total: int
    model: int


@dataclass(frozen=True)
class Way:
    """Settings that need less memory, and what they do."""

    settings: tuple[str, ...]
    effect: str
    resumes: bool


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def ways_out(settings: RunConfig, doing: Doing, dtype: torch.dtype) -> list[Way]:
    """What would need less, the mildest first. Those that resume leave what is learned as it was."""
    run, found = settings.training, []
    smaller = next((n for n in range(run.batch_size // 2, 0, -1) if run.batch_size % n == 0), None)
    if smaller is not None:
        times = run.batch_size // smaller
        each = (f"training.batch_size={smaller}", f"training.gradient_accumulation={run.gradient_accumulation * times}")
        share = "half" if times == 2 else f"1/{times}"
        found.append(Way(each, f"{share} of what the batch takes; the same rows in each step", resumes=True))
    if not run.gradient_checkpointing and doing.phase != "the evaluation":
        effect = "keeps one value for each layer and token, computes the others twice; about a third slower"
        found.append(Way(("training.gradient_checkpointing=true",), effect, resumes=True))
    if dtype == torch.float32 and settings.dtype != "bfloat16":
        found.append(Way(("dtype=bfloat16",), "half of what the weights and the batch take", resumes=False))
    if doing.batch is not None and (half := doing.batch.tokens // 2) >= _SHORTEST:
        if run.packing:
            found.append(Way((f"training.max_length={half}",), "half of what a row takes", resumes=False))
        else:
            each = (f"training.max_length={half}", "data.too_long=drop")
            found.append(Way(each, "at most half of what a row takes; leaves out longer rows", resumes=False))
    return found


def explained(
    error: BaseException,
    settings: RunConfig,
    doing: Doing,
    *,
    step: int,
    steps: int,
    dtype: torch.dtype,
    trained: int,
    room: Room,
) -> RunError:
    """The error for memory that ran out.

    step, steps  the one that was being made, and how many there are
    dtype        of the model
    trained      how many numbers are trained
    room         where it runs
    """
    where = f" on {doing.batch}" if doing.batch is not None else ""
    state = trained * _OF_A_TRAINED_NUMBER
    lines = [
        _first_sentence(error),
        f"{room.device} has {_bytes(room.total)} in all; the model takes {_bytes(room.model)}, training it "
        f"{_bytes(state)} more, and the batch the rest.",
    ]
    if doing.largest is not None:
        lines.append(f"The largest batch that went through was {doing.largest}.")
    ways = ways_out(settings, doing, dtype)
    if ways:
        lines.append("What would need less, the mildest first:")
        lines += [f"  {' '.join(way.settings)}   {way.effect}" for way in ways]
    else:
        lines.append("No setting is left that would need less: take a smaller model, or a device with more memory.")
    if 10 * state < room.model:
        lines.append("A smaller lora.r would hardly help: what it changes is small beside the rest.")
    else:
        lines.append(
            "Much is trained: fewer lora.modules_to_save or lora.target_modules, or a smaller lora.r, help too."
        )
    lines.append(_how_to_go_on(settings, ways))
    return RunError(bullet_list(f"Memory ran out at step {step} of {steps}, in {doing.phase}{where}.", lines))


def _how_to_go_on(settings: RunConfig, ways: list[Way]) -> str:
    """What is kept, and the command that goes on from it or begins anew, with the first of the ways in it."""
    output = Path(settings.output).expanduser()
    kept = complete_checkpoints(output / CHECKPOINTS)
    command = f"veneer train {quote(str(output / SETTINGS_FILE))}"
    resuming = [way for way in ways if way.resumes]
    if kept and resuming:
        again = ["training.resume=true", *(["overwrite=false"] if settings.overwrite else []), *resuming[0].settings]
        return f"Kept: {kept[-1]}. Go on with: {command} {' '.join(again)}"
    anew = ["overwrite=true", *(["training.resume=false"] if settings.training.resume else [])]
    anew += ways[0].settings if ways else ()
    what = f"Kept: {kept[-1]}, made with these settings" if kept else "Nothing was saved (training.save_every=… does)"
    return f"{what}. Begin anew with: {command} {' '.join(anew)}"


def _first_sentence(error: BaseException) -> str:
    """What the allocator said, without its advice on itself and without source lines of torch."""
    text = str(error).partition("\n")[0].strip() or type(error).__name__
    start = text.rfind("] ")
    text = text[start + 2 :] if start >= 0 and text[start + 2 :].strip() else text
    sentences = text.split(". ")
    return ". ".join(sentences[:2]).rstrip(".") + "."


def _bytes(count: int) -> str:
    """A number of bytes for people.

    >>> _bytes(3 * 2**30), _bytes(5_000_000)
    ('3.0 GiB', '4.8 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def room_on(device: torch.device, model: torch.nn.Module) -> Room:
    """The memory of a device, and what a model takes of it."""
    tensors = [*model.parameters(), *model.buffers()]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if device.type == "cuda":
        return Room(str(device), torch.cuda.mem_get_info(device)[1], taken)
    import psutil

    return Room("This computer", psutil.virtual_memory().total, taken)


def model_too_large(name: str, error: BaseException) -> RunError:
    """The error for a model that there is no memory for, before any training."""
    return RunError(
        bullet_list(
            f"There is not enough memory for the model {name}.",
            [_first_sentence(error), "dtype=bfloat16 takes half of what float32 does. Or take a smaller model."],
        )
    )

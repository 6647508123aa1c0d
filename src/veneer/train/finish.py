"""What a run leaves behind: the adapter in one step, once it is known to be one, and the curve of its loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import RunError
from veneer.model.model_card import card_of_model
from veneer.model.overlay import DEFAULT
from veneer.storage.card import CARD_FILE, read_card
from veneer.storage.write import write_folder
from veneer.train.packages import has
from veneer.train.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    output: Path,
    before: Mapping[str, "Tensor"],
    after: Mapping[str, "Tensor"],
    state: Mapping[str, "Tensor"] | None,
    said: str,
) -> Path:
    """Write the adapter, its tokenizer and its card, once its numbers are finite and not those it began with.

    before, after  what is trained, by name; state  where the adapter's values are if the model is in shards
    """
    broken = [name for name, p in after.items() if not p.isfinite().all()]
    if broken:
        raise RunError(f"{len(broken)} trained tensors hold numbers that are not finite, first {broken[0]}: not saved.")
    if all(value.equal(before[name]) for name, value in after.items()):
        raise RunError(
            f"Training changed nothing: all {len(after)} trained tensors are as they were, so no adapter was written.\n"
            "  Try a larger training.learning_rate, or more steps."
        )

    def fill(stage: Path) -> None:
        if (card := read_card(output / "adapter")) is not None:  # what its reader wrote into it stays
            (stage / CARD_FILE).write_bytes(card.encode())
        model.save_pretrained(str(stage), state_dict=None if state is None else dict(state))
        tokenizer.save_pretrained(str(stage))
        card_of_model(model, DEFAULT, stage, said={"training": said})

    write_folder(output / "adapter", fill)
    return output / "adapter"


def plot(
    losses: Sequence[tuple[int, float]], eval_losses: Sequence[tuple[int, float]], path: Path, progress: Progress
) -> Path | None:
    """Draw loss.png, where matplotlib is installed."""
    from veneer.train.plot import plot_losses

    if not has("plot"):
        progress.say("Note: no loss.png, as matplotlib is not installed: pip install 'veneer[plot]'")
        return None
    plot_losses(losses, path, eval_losses=eval_losses)
    return path

"""What programs share that run on Veneer and on PEFT: adapters with the same numbers, and what to ask a folder."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn


def fill(model: nn.Module, *, seed: int = 0, scale: float = 0.1, adapter_name: str = "default") -> None:
    """Give an adapter small random numbers that depend on nothing but their names in a file."""
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    for key in sorted(state):
        if ".lora_" in key:
            state[key] = scale * torch.randn(state[key].shape, generator=generator)
    set_peft_model_state_dict(model, state, adapter_name=adapter_name)


def digest(model: nn.Module, adapter_name: str = "default") -> float:
    """One number that changes when a value of the adapter does."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    parts = [(at % 7 + 1) * float(state[key].double().abs().sum()) for at, key in enumerate(sorted(state))]
    return round(sum(parts), 4)


def losses(trainer) -> list[float]:
    """The losses that a trainer logged, step by step."""
    return [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry]


def names(folder: str | Path) -> list[str]:
    """The files of a folder with weights in their name."""
    return sorted(file.name for file in Path(folder).rglob("*") if "model" in file.name or "adapter" in file.name)


@contextmanager
def said() -> Iterator[list[str]]:
    """Collect the warnings that are given within the block: the first line of each, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: list[str] = []
        yield found
    found += sorted({f"{one.category.__name__}: {str(one.message).splitlines()[0]}" for one in caught})

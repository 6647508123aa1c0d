"""The same training steps here and in PEFT, on the same adapter."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tiny
import veneer
from parity import oracle
from veneer.model.tensors import adapter_tensors


def made_alike(base: nn.Module, folder: Path, **fields: Any) -> tuple[Any, veneer.PeftModel]:
    """PEFT's model and ours over copies of `base`, with equal random adapters, both ready to train."""
    theirs = tiny.shake(oracle.made_by_peft(base, **{"r": 4, "lora_alpha": 6, **fields})).eval()
    oracle.save(theirs, folder)
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    return theirs, ours


def loss_of(model: Any) -> Tensor:
    """Of a language model, cross-entropy; of another, a number that depends on every output."""
    if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
        ids = tiny.ids()
        return model(input_ids=ids, labels=ids).loss
    return model(tiny.ids(20)).square().mean()


def run(model: Any, optimizer: Optimizer, steps: int, each: Callable[[], None] = lambda: None) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        each()
    return losses


def ours_on_disk(model: veneer.PeftModel) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in adapter_tensors(model.get_base_model(), "default").items()}


def assert_same_adapter(ours: veneer.PeftModel, theirs: Any, **tolerance: Any) -> None:
    """By names on disk, but those biases that PEFT writes for bias="all" though nothing uses them."""
    unused = (".original_module.", ".modules_to_save.")
    expected = {key: value for key, value in oracle.values(theirs).items() if not any(part in key for part in unused)}
    found = ours_on_disk(ours)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)

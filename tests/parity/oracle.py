"""PEFT as the oracle: the same adapter on the same model, made there and read here, or the other way round."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What PEFT warns about is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def made_by_peft(base: nn.Module, **fields: Any) -> Any:
    """A PEFT model over a copy of `base`; its random start is always the same."""
    torch.manual_seed(0)
    return quietly(peft.get_peft_model, copy.deepcopy(base), peft.LoraConfig(**fields))


def read_by_peft(base: nn.Module, folder: Path, *, is_trainable: bool = False) -> Any:
    """The adapter in a folder, as PEFT reads it, over a copy of `base`."""
    return quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(folder), is_trainable=is_trainable)


def save(model: Any, folder: Path) -> Path:
    quietly(model.save_pretrained, str(folder), save_embedding_layers=False)
    return folder


def values(model: Any) -> dict[str, Any]:
    """A PEFT model's adapter tensors by their names on disk."""
    return quietly(peft.get_peft_model_state_dict, model, save_embedding_layers=False)


def gradients(model: Any) -> dict[str, Any]:
    """Gradients of a PEFT model's trainable parameters by their names on disk."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".default", "").replace(".modules_to_save", "")
            found[key.removesuffix(".weight") if "lora_magnitude_vector" in key else key] = parameter.grad
    return found

"""PEFT's functions that are a line or two of Veneer's, with PEFT's arguments."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import VeneerError, check_kind
from veneer.layers.adapter import Adapter
from veneer.layers.attach import Adapted
from veneer.model.overlay import overlay_of, own_parameters
from veneer.model.tuner import LoraModel


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig:
    """The config that these fields describe; `peft_type`, if it is there, must be "LORA"."""
    return LoraConfig(**config_dict)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether an adapter that can be used lies in this folder or repository."""
    try:
        LoraConfig.from_pretrained(model_name_or_path)
    except VeneerError:
        return False
    return True


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the block no adapter casts its input to the dtype of its factors, since hooks see to dtypes.

    active  False changes nothing
    """
    adapters = [module for module in model.modules() if isinstance(module, Adapter)] if active else []
    outside = [adapter.casts_input for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.casts_input = False
        yield
    finally:
        for adapter, casts in zip(adapters, outside, strict=True):
            adapter.casts_input = casts


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: type = Adapted
) -> None:
    """Let these adapters act on a model, and only them; `layer_cls` is there for PEFT's callers."""
    LoraModel(model).set_adapter(adapter_name, inference_mode=inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: type = Adapted
) -> list[str] | None:
    """Remove an adapter; returns those that act then, None if none does. `prefix` and `layer_cls` are PEFT's."""
    LoraModel(model).delete_adapter(adapter_name)
    overlay = overlay_of(model)
    return None if overlay is None else list(overlay.route.active) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Say whether adapters train."""
    LoraModel(model).set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Give an adapter's half-precision parameters float32."""
    if not autocast_adapter_dtype:
        return
    for parameter in own_parameters(model, adapter_name):
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def check_hotswap_configs_compatible(config0: LoraConfig, config1: LoraConfig) -> None:
    """Raise ArgumentError unless both are LoRA; that one can take the other's place is checked when it is to."""
    for config in (config0, config1):
        check_kind(config, LoraConfig, "A LoraConfig")


def submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, the module's name in it) for a dotted path."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight as (out, in)."""
    return weight.T if fan_in_fan_out else weight


def infer_device() -> str:
    """The accelerator there is, or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None

"""The front door to transformers' models: adapters on one in place, which stays a PreTrainedModel."""

from pathlib import Path
from typing import Any

from torch import Generator, nn

from veneer.config import LoraConfig
from veneer.integrations.adapted_model import lay_new_over, let_act, refuse_other_door
from veneer.model.apply import one_at_a_time
from veneer.model.files import load_adapter as load_from_folder
from veneer.model.overlay import DEFAULT
from veneer.storage.hub import adapter_folder


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = DEFAULT,
    *,
    autocast_adapter_dtype: bool = True,
    generator: Generator | None = None,
) -> None:
    """Freeze a transformers model and lay a new trainable adapter over it, in place. The new one acts; others rest.

    autocast_adapter_dtype  keep the adapter in float32 over a half-precision base
    generator               where the adapter's random numbers come from

    Raises ArgumentError if the config is none, AttachError if the model has adapters by `get_peft_model` or
    `inject_adapter_in_model`, and what `veneer.get_peft_model` raises; and then the model is as it was.

    >>> veneer.add_adapter(model, veneer.LoraConfig(r=8))  # doctest: +SKIP
    """
    lay_new_over(model, adapter_name, config, float32=autocast_adapter_dtype, generator=generator)


@one_at_a_time
def load_adapter(
    model: nn.Module,
    location: str | Path,
    adapter_name: str = DEFAULT,
    *,
    is_trainable: bool = False,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Lay a saved adapter over a transformers model, in place. The new one acts; others rest.

    location      an adapter folder, or a hub id with `revision=`, `token=`, `cache_dir=`, … as on the hub
    is_trainable  go on training it; otherwise it is frozen and the model is put into evaluation

    Raises AdapterFileError, ConfigError, TargetError, or AdapterNameError if the name is taken (`hotswap_adapter` puts
    an adapter in the place of another); and then the model is as it was.

    >>> veneer.load_adapter(model, "adapter")  # doctest: +SKIP
    """
    refuse_other_door(model)
    folder = adapter_folder(location, subfolder=subfolder, **hub)
    load_from_folder(model, adapter_name, folder, trainable=is_trainable)
    let_act(model, adapter_name, trainable=is_trainable)

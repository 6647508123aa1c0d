"""Adapters on a transformers model in place: it stays a PreTrainedModel, and its own methods know the adapter.

The model's class is swapped for one made on the fly whose `save_pretrained` writes an adapter folder in PEFT's format,
as transformers does for models that PEFT adapted. So Trainer and TRL write adapter-only checkpoints;
`LoraTrainerMixin` lets them go on from such a checkpoint.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import AdapterFileError, AttachError
from veneer.model.apply import add_adapter as _add_adapter
from veneer.model.apply import protect_checkpointing, set_enabled
from veneer.model.files import load_adapter as _load_adapter
from veneer.model.files import read_checked, save_adapter
from veneer.model.overlay import overlay_of
from veneer.model.tensors import copy_tensors
from veneer.storage.adapter_file import WEIGHTS_FILE
from veneer.storage.hub import adapter_folder

DEFAULT = "default"


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = DEFAULT,
    *,
    autocast_adapter_dtype: bool = True,
    generator: Generator | None = None,
) -> None:
    """Freeze a transformers model and lay a new trainable adapter over it, in place.

    Raises what `veneer.get_peft_model` raises, and then the model is as it was.
    """
    name = vars(model).get("name_or_path")
    if isinstance(config, LoraConfig) and config.base_model_name_or_path is None and name:
        config = config.changed(base_model_name_or_path=name)
    _add_adapter(model, adapter_name, config, float32=autocast_adapter_dtype, generator=generator)
    _teach(model)


def load_adapter(
    model: nn.Module,
    location: str | Path,
    adapter_name: str = DEFAULT,
    *,
    is_trainable: bool = False,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Lay a saved adapter over a transformers model, in place. `location` is a folder or a hub id.

    Raises AdapterFileError, ConfigError or TargetError, and then the model is as it was.
    """
    folder = adapter_folder(location, subfolder=subfolder, **hub)
    _load_adapter(model, adapter_name, folder, trainable=is_trainable)
    _teach(model)


class AdaptedModel(nn.Module):
    """Placed in front of a transformers model's class while adapters lie over it."""

    _hf_peft_config_loaded = True  # what transformers asks before it saves adapters and not the whole model

    def active_adapters(self) -> list[str]:
        """The names of the adapters that act."""
        overlay = overlay_of(self)
        return [] if overlay is None else list(overlay.route.active)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """Write the active adapter to a folder in PEFT's format; never the base model.

        To save the base model, remove the adapters first, or merge them.
        """
        active = self.active_adapters()
        if len(active) != 1:
            raise AdapterFileError(
                f"Not saved to {save_directory}: one adapter is saved at a time, and {len(active)} are active."
            )
        if options.get("state_dict") is not None:
            raise AdapterFileError(f"Not saved to {save_directory}: saving gathered shards is not available yet.")
        if is_main_process:
            save_adapter(self, active[0], Path(save_directory))

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        # where all of transformers' ways to switch checkpointing on end: recompute on the route of forward time
        super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[operator]
        protect_checkpointing(self)

    def disable_adapters(self) -> None:
        """Let no adapter act until `enable_adapters`."""
        set_enabled(self, False)

    def enable_adapters(self) -> None:
        """Let the active adapters act again."""
        set_enabled(self, True)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (_plain_class(self),), self.__dict__


@cache
def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    # the name stays: transformers writes it into config.json and looks tasks up by it
    return type(base.__name__, (AdaptedModel, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _plain_class(model: Any) -> type[nn.Module]:
    mro = type(model).__mro__
    return mro[mro.index(AdaptedModel) + 1]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _adapted_class(base)
    return cls.__new__(cls)


def _teach(model: nn.Module) -> None:
    if not isinstance(model, AdaptedModel):
        model.__class__ = _adapted_class(type(model))


def forget(model: nn.Module) -> None:
    """Give a model whose adapters were removed or merged its own class back."""
    if isinstance(model, AdaptedModel):
        if overlay_of(model) is not None:
            raise AttachError("The model still has adapters: merge or remove them first.")
        model.__class__ = _plain_class(model)  # type: ignore[assignment]


class LoraTrainerMixin:
    """Placed in front of `transformers.Trainer` (or TRL's): go on from adapter-only checkpoints.

    class MyTrainer(LoraTrainerMixin, SFTTrainer): ...
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model  # type: ignore[attr-defined]
        if not _restore(target, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if best is None or not _restore(self.model, Path(best)):  # type: ignore[attr-defined]
            super()._load_best_model()  # type: ignore[misc]


def _restore(model: nn.Module, folder: Path) -> bool:
    """Copy an adapter folder into the active adapter of the same settings. False if there is nothing to do so."""
    if not isinstance(model, AdaptedModel) or not (folder / WEIGHTS_FILE).exists():
        return False
    (name,) = model.active_adapters()
    tensors: Mapping[str, Tensor] = read_checked(model, name, folder)
    copy_tensors(model, name, tensors)
    return True

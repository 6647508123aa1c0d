"""Adapters on a transformers model in place: it stays a PreTrainedModel, and its own methods know the adapter.

The model's class is swapped for one made on the fly whose `save_pretrained` writes an adapter folder in PEFT's format,
as transformers does for models that PEFT adapted. So Trainer and TRL write adapter-only checkpoints;
`LoraTrainerMixin` lets them go on from such a checkpoint.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import AdapterFileError, AttachError
from veneer.layers import swap
from veneer.model.apply import add_adapter as _add_adapter
from veneer.model.apply import set_enabled
from veneer.model.batch import serving
from veneer.model.files import load_adapter as _load_adapter
from veneer.model.files import read_checked, save_adapter
from veneer.model.merge import disable
from veneer.model.overlay import overlay_of
from veneer.model.pretrained import with_base_name
from veneer.model.tensors import copy_tensors
from veneer.storage.adapter_file import WEIGHTS_FILE
from veneer.storage.hub import adapter_folder

DEFAULT = "default"  # the name PEFT gives to the only adapter


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
    config = with_base_name(config, model)
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


class AdaptedModel(swap.Front):
    """Placed in front of a transformers model's class while adapters lie over it.

    The class keeps its name: transformers writes it into config.json and looks tasks up by it.
    """

    _hf_peft_config_loaded = True  # what transformers asks before it saves adapters and not the whole model

    def active_adapters(self) -> list[str]:
        """The names of the adapters that act."""
        overlay = overlay_of(self)
        return [] if overlay is None else list(overlay.route.active)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the active adapter to a folder in PEFT's format; never the base model.

        state_dict  a state dict of this model to take the values from, as gathered from shards
        options     those that shape a base checkpoint (`max_shard_size`, `variant`, …) change nothing here

        To save the base model, remove the adapters first, or merge them. Raises AdapterFileError.
        """
        if push_to_hub:
            raise AdapterFileError("push_to_hub is not available yet: save to a folder and upload that.")
        name = _only_active(self, f"Not saved to {save_directory}")
        if is_main_process:
            save_adapter(self, name, Path(save_directory), state=state_dict)

    def __call__(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward; `adapter_names` and `alora_offsets` as on a PeftModel."""
        # not forward itself: Trainer and generate read its signature
        if adapter_names is None and alora_offsets is None:
            return super().__call__(*args, **kwargs)
        with serving(self, args, kwargs, adapter_names=adapter_names, alora_offsets=alora_offsets):
            return super().__call__(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own generate; `adapter_names` and `alora_offsets` as on a PeftModel."""
        with serving(self, args, kwargs, adapter_names=adapter_names, alora_offsets=alora_offsets, generating=True):
            return super().generate(*args, **kwargs)  # type: ignore[operator]

    def disable_adapters(self) -> None:
        """Let no adapter act until `enable_adapters`."""
        disable(self)

    def enable_adapters(self) -> None:
        """Let the active adapters act again."""
        set_enabled(self, True)


def _teach(model: nn.Module) -> None:
    if not isinstance(model, AdaptedModel):
        swap.place(model, AdaptedModel)


def forget(model: nn.Module) -> None:
    """Give a model whose adapters were removed or merged its own class back."""
    if isinstance(model, AdaptedModel):
        if overlay_of(model) is not None:
            raise AttachError("The model still has adapters: merge or remove them first.")
        swap.take_away(model)


def _only_active(model: AdaptedModel, what: str) -> str:
    """The name of the one active adapter. Raises AdapterFileError if there are more or none."""
    active = model.active_adapters()
    if len(active) != 1:
        raise AdapterFileError(f"{what}: one adapter is saved or restored at a time, and {len(active)} are active.")
    return active[0]


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
    name = _only_active(model, f"{folder} was not restored")
    tensors = read_checked(model, name, folder)
    copy_tensors(model, name, tensors)
    return True

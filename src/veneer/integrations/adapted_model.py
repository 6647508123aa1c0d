"""A transformers model with adapters on it: it stays what it is, and its own methods know the adapters.

The model's class is swapped for one made on the fly, which has the methods that transformers gives to models adapted
by PEFT, under the same names, and whose `save_pretrained` writes an adapter folder in PEFT's format. With the last
adapter, removed or merged, the model gets its own class back.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Generator, Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import AdapterNameError, AttachError, ConfigError, check_kind
from veneer.integrations.load_arguments import source_of
from veneer.integrations.saved_adapter import SavedAdapter
from veneer.layers import swap
from veneer.layers.route import as_names
from veneer.model.apply import activate, add_adapter, one_at_a_time, set_enabled
from veneer.model.batch import serving
from veneer.model.facade import teach_libraries
from veneer.model.files import save_adapter
from veneer.model.hotswap import prepare_model_for_compiled_hotswap
from veneer.model.merge import disable
from veneer.model.methods import AdapterMethods
from veneer.model.model_card import card_of_model
from veneer.model.overlay import DEFAULT, overlay_of, sole_active
from veneer.model.pretrained import with_base_name
from veneer.model.push import push_adapters
from veneer.model.saving_methods import refuse_pickles
from veneer.model.sharded import is_sharded_model
from veneer.model.state_dict import get_peft_model_state_dict
from veneer.model.tuner import LoraModel

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class AdaptedModel(swap.Front):
    """Placed in front of a transformers model's class while adapters lie over it.

    The class keeps its name: transformers writes it into config.json and looks tasks up by it. `add_adapter` and
    `load_adapter` also work as functions of a model that has no adapter yet.
    """

    whole = True
    _hf_peft_config_loaded = True  # what transformers asks before it saves adapters and not the whole model

    def add_adapter(self, adapter_config: LoraConfig, adapter_name: str | None = None) -> None:
        """Lay a new trainable adapter over the model; it acts, and the others rest.

        Raises ArgumentError if the config is none, and what `veneer.add_adapter` raises.
        """
        lay_new_over(self, adapter_name or DEFAULT, adapter_config)

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: LoraConfig | dict[str, Any] | None = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        hotswap: bool | Literal["auto"] = "auto",
        local_files_only: bool = False,
        adapter_kwargs: dict[str, Any] | None = None,
        load_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Lay a saved adapter over the model; it acts, and the others rest.

        peft_model_id       a folder or a hub id
        peft_config         used instead of the config that lies there
        adapter_state_dict  values by their names in an adapter file, with or without `base_model.model.`
        is_trainable        go on training it; otherwise it is frozen and the model is put into evaluation
        hotswap             True: put it in the place of the adapter of that name, without touching a layer; "auto":
                            so if there is one and `enable_peft_hotswap` was called
        adapter_kwargs      options for the hub, as may be in load_config.download_kwargs and by keyword

        low_cpu_mem_usage is there for PEFT's callers. Returns transformers' LoadStateDictInfo, which is empty: an
        adapter that does not fit exactly is refused. Raises what `veneer.load_adapter` and `veneer.hotswap_adapter`
        raise, and then the model is as it was.
        """
        source = source_of(peft_model_id, adapter_kwargs, load_config, kwargs, local_files_only=local_files_only)
        saved = SavedAdapter(source, _config(peft_config), adapter_state_dict)
        _load(self, adapter_name or DEFAULT, saved, trainable=is_trainable, hotswap=hotswap)
        return _nothing_missing()

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let one adapter act, or several in order; the others rest. One that was loaded frozen stays frozen.

        Raises AdapterNameError, or AttachError if two of them have replaced the same weight (LoftQ).
        """
        LoraModel(self).set_adapter(adapter_name)

    def disable_adapters(self) -> None:
        """Let no adapter act until `enable_adapters`."""
        disable(self)

    def enable_adapters(self) -> None:
        """Let the active adapters act again."""
        set_enabled(self, True)

    def active_adapters(self) -> list[str]:
        """The names of the adapters that act, in order."""
        overlay = overlay_of(self)
        return [] if overlay is None else list(overlay.route.active)

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters. If no active one is left, the first that is there becomes active.

        With the last one the model gets its own class back. Raises AdapterNameError or MergeError.
        """
        names, model = as_names(adapter_names), LoraModel(self)
        model._overlay.check_names(names)
        for name in sorted(names, key=self.active_adapters().__contains__):  # resting ones first: none wakes in vain
            model.delete_adapter(name)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The values of one adapter, the first active one unless named, by their names in a file, less the prefix.

        state_dict  a state dict of this model to take the values from, as gathered from shards
        """
        name = adapter_name or next(iter(self.active_adapters()), None)
        if name is None:
            raise AdapterNameError("No adapter is active: name one.")
        return get_peft_model_state_dict(self, state_dict, name)

    def enable_peft_hotswap(
        self, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
    ) -> None:
        """Let adapters be replaced in place by ones of other scales and ranks up to `target_rank`.

        Called before the first adapter, it holds for what `load_adapter` brings; afterwards, unless `check_compiled`
        is "error", for the adapters there are, too. Raises AttachError or ConfigError.
        """
        if check_compiled == "error":
            raise AttachError(
                "Call enable_peft_hotswap before loading the first adapter, or with check_compiled='warn' or 'ignore' "
                "to prepare the ones that are there."
            )
        prepare_model_for_compiled_hotswap(self, target_rank=target_rank, check_compiled=check_compiled)
        vars(self)[_HOTSWAP] = True
        vars(self)[_HOTSWAP_ARGUMENTS] = {"target_rank": target_rank, "check_compiled": check_compiled}

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
        push_to_hub upload it, too; `repo_id` and further options as of `push_to_hub`
        options     those that shape a base checkpoint (`max_shard_size`, `variant`, …) change nothing here

        To save the base model, remove the adapters first, or merge them. Raises AdapterFileError, or ConfigError for
        safe_serialization=False, which would write a pickle.
        """
        refuse_pickles(options.pop("safe_serialization", True))
        name = sole_active(self, f"Not saved to {save_directory}")
        if not is_main_process and (state_dict is not None or not is_sharded_model(self)):
            return
        save_adapter(self, name, Path(save_directory), state=state_dict)
        if push_to_hub:
            repo_id = options.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(repo_id, state_dict=state_dict, **options)

    def push_to_hub(
        self, repo_id: str, *, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> "CommitInfo":
        """Upload the active adapter, with its model card, in one commit; never the base model. As on a PeftModel."""
        name = sole_active(self, f"Not pushed to {repo_id}")

        def save(folder: Path, card: Mapping[str, Any]) -> None:
            save_adapter(self, name, folder, state=state_dict, card=card)

        return push_adapters(save, repo_id, [LoraModel(self).peft_config[name]], **options)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write README.md into a folder, or renew what Veneer wrote there. As on a PeftModel; Trainer calls it."""
        card_of_model(self, sole_active(self, f"No model card was written to {output_dir}"), Path(output_dir))

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


class AdaptedModelOfLanguages(AdaptedModel):
    """The same for models whose own `load_adapter` is about something else: Wav2Vec2's loads a language."""

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own. For a LoRA adapter call `veneer.load_adapter(model, …)`."""
        return super(AdaptedModel, self).load_adapter(*args, **kwargs)  # type: ignore[misc]


_HOTSWAP = "_hotswap_enabled"  # where transformers notes what `enable_peft_hotswap` was called with
_HOTSWAP_ARGUMENTS = "_prepare_peft_hotswap_kwargs"
_MIXIN = "PeftAdapterMixin"


@one_at_a_time
def lay_new_over(
    model: nn.Module, name: str, config: LoraConfig, *, float32: bool = True, generator: Generator | None = None
) -> None:
    """`veneer.add_adapter`, which says what the arguments mean and what is raised."""
    check_kind(config, LoraConfig, "A config (a veneer.LoraConfig)")
    refuse_other_door(model)
    add_adapter(model, name, with_base_name(config, model), float32=float32, generator=generator)
    let_act(model, name, trainable=True)


def let_act(model: nn.Module, name: str, *, trainable: bool) -> None:
    """Let an adapter on the model act, and the model's methods know it. One that does not train is for evaluation."""
    if not isinstance(model, AdaptedModel):
        swap.place(model, _front_for(type(model)))
    teach_libraries()
    activate(model, (name,))
    if not trainable:
        model.eval()


def _front_for(kind: type[nn.Module]) -> type[AdaptedModel]:
    owner = next((one for one in kind.__mro__ if "load_adapter" in vars(one)), None)
    return AdaptedModel if owner is None or owner.__name__ == _MIXIN else AdaptedModelOfLanguages


def refuse_other_door(model: nn.Module) -> None:
    """Raise AttachError if the model's adapters came another way: it cannot have two sets of methods."""
    if isinstance(model, AdapterMethods):
        raise AttachError(f"{type(model).__name__} is a facade over a model already: call its own method of this name.")
    if overlay_of(model) is not None and not isinstance(model, AdaptedModel):
        raise AttachError(
            "The model has adapters by get_peft_model or inject_adapter_in_model already: add further ones in the same "
            "way, or remove them first (unload())."
        )


@one_at_a_time
def _load(
    model: nn.Module, name: str, saved: SavedAdapter, *, trainable: bool, hotswap: bool | Literal["auto"]
) -> None:
    """`AdaptedModel.load_adapter` with its arguments sorted."""
    if hotswap not in (True, False, "auto"):
        raise ConfigError(f"hotswap={hotswap!r}: must be True, False or 'auto'.")
    refuse_other_door(model)
    overlay = overlay_of(model)
    there, prepared = overlay is not None and name in overlay.configs, bool(vars(model).get(_HOTSWAP))
    if hotswap is True and not there:
        raise AdapterNameError(f"hotswap=True, and there is no adapter {name!r} to put the new one in the place of.")
    if there and (hotswap is True or (hotswap == "auto" and prepared)):
        saved.put_in_place(model, name, trainable=trainable)
        if not trainable:
            model.eval()
        return
    saved.lay_over(model, name, trainable=trainable)
    let_act(model, name, trainable=trainable)
    if prepared:
        options = {"target_rank": 128, "check_compiled": "error"} | (vars(model).get(_HOTSWAP_ARGUMENTS) or {})
        prepare_model_for_compiled_hotswap(model, **options)


def _config(given: LoraConfig | dict[str, Any] | None) -> LoraConfig | None:
    return LoraConfig.from_dict(given, source="peft_config") if isinstance(given, dict) else given


def _nothing_missing() -> Any:
    """What transformers' own loading returns when every value had its place."""
    from transformers.utils.loading_report import LoadStateDictInfo

    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )

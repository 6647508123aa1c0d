"""PeftModel: a model with adapters that knows its task and its files, under PEFT's names."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Generator, Tensor, nn

from veneer.config import LoraConfig, TaskType
from veneer.errors import AdapterNameError, ArgumentError, AttachError, ConfigError, VeneerWarning, check_kind
from veneer.model.apply import add_adapter
from veneer.model.files import load_adapter, save_adapters
from veneer.model.methods import AdapterMethods
from veneer.model.model_card import card_of_model
from veneer.model.overlay import as_names, overlay_needed, overlay_of
from veneer.model.pretrained import guard_saving, with_base_name
from veneer.model.push import push_adapters
from veneer.model.report import count_parameters, trainable_line
from veneer.model.restore import DEFAULT, restore
from veneer.model.state_dict import LoadResult
from veneer.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from veneer.model.teach_trainer import teach_trainer
from veneer.model.teach_trl import teach_trl
from veneer.model.tuner import LoraModel
from veneer.storage.hub import adapter_folder
from veneer.storage.push import check_push_options

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


_PLACES = ("torch_device", "device_map", "max_memory", "offload_folder")


class PeftModel(AdapterMethods):
    """A model with adapters. `base_model.model` is the user's own model; unknown attributes are its.

    Made by `get_peft_model` or `PeftModel.from_pretrained`. It is called, generates and trains as the model itself.

    >>> model = PeftModel.from_pretrained(base, "adapter")  # doctest: +SKIP
    >>> model.load_adapter("other", "second"); model.set_adapter("second")  # doctest: +SKIP
    >>> with model.disable_adapter():
    ...     model(**batch)  # doctest: +SKIP
    >>> plain = model.merge_and_unload()  # doctest: +SKIP
    """

    base_model: LoraModel
    _hf_peft_config_loaded = True  # Trainer asks for it where the base is quantised, before it trains

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = DEFAULT,
        *,
        autocast_adapter_dtype: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        _refuse_second_facade(model)
        add_adapter(
            model,
            adapter_name,
            with_base_name(peft_config, model),
            float32=autocast_adapter_dtype,
            generator=generator,
        )
        self._hold(model)

    @property
    def bare(self) -> nn.Module:
        """The user's own model, with the adapters on it."""
        return self.base_model.model

    @classmethod
    def _over(cls, model: nn.Module) -> Self:
        """The facade over a model that has its adapters already."""
        facade = cls.__new__(cls)
        nn.Module.__init__(facade)
        facade._hold(model)
        return facade

    def _hold(self, model: nn.Module) -> None:
        self.base_model = LoraModel(model)
        guard_saving(model)
        teach_trainer(PeftModel)
        teach_trl(PeftModel)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, with the active adapters, or with those of each row (`LoraModel`)."""
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not built yet, as while unpickling
                raise
            return getattr(self.base_model, name)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation. Warns if there is nothing to train."""
        if mode and "base_model" in self._modules and not any(p.requires_grad for p in self.parameters()):
            warnings.warn(
                "Nothing here can be trained: the adapter was loaded for use. To go on training it, load it with "
                "is_trainable=True, or call set_requires_grad(name, True).",
                VeneerWarning,
                stacklevel=2,
            )
        return super().train(mode)

    def get_base_model(self) -> nn.Module:
        """The user's own model, with the adapters on it."""
        return self.base_model.model

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the first active adapter. Raises AdapterNameError if none is."""
        if not self.active_adapters:
            raise AdapterNameError("No adapter is active, so there is no config of it.")
        return self.peft_config[self.active_adapters[0]]

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        convert_mutated_init: bool = True,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write adapters in PEFT's format: `default` to the folder itself, each other one to a subfolder of its name.

        state_dict            a state dict of this model to take the values from, as gathered from shards
        convert_mutated_init  write adapters that take their start off the base (PiSSA, say) as plain LoRA of twice the
                              rank over the original base; False: as trained, for readers that do the same start again

        push_to_hub           upload the same, too: `repo_id` (the folder's name unless given) and what else
                              `push_to_hub` takes

        A model card, README.md, lies beside the adapter; what you wrote into it stays (`create_or_update_model_card`).
        path_initial_model_for_weight_conversion is there for PEFT's callers; the start is remembered, not read.

        Each folder is replaced in one step. Raises AdapterNameError or AdapterFileError.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle; adapters are written as safetensors.")
        if save_embedding_layers not in ("auto", False):
            raise ConfigError(
                "save_embedding_layers=True would write base weights into the adapter. To train and save embeddings, "
                "name them in modules_to_save; to save the base, call its own save_pretrained."
            )
        names = list(self.peft_config) if selected_adapters is None else as_names(selected_adapters)
        check_kind(save_directory, (str, os.PathLike), "The folder to save to (save_directory)")
        if selected_adapters is not None and not names:
            raise AdapterNameError("There is nothing to save: no adapter is selected.")
        if not is_main_process:
            return
        overlay_needed(self.bare).check_names(names)
        if hub and not push_to_hub:
            raise ArgumentError(f"save_pretrained takes {', '.join(sorted(hub))} only with push_to_hub=True.")
        check_push_options(hub)
        how = {"state": state_dict, "plain": convert_mutated_init}
        save_adapters(self.bare, names, Path(save_directory), **how)
        if push_to_hub:
            self._push(hub.pop("repo_id", None) or Path(save_directory).name, names, hub, **how)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
    ) -> "CommitInfo":
        """Upload every adapter, as `save_pretrained` writes it, with a model card, in one commit.

        repo_id    `user/name`, made if there is none; a name alone means your own account
        private    make a new repository private; nothing changes about one that is there
        token      of an account that may write there; unless given, that of `hf auth login` or HF_TOKEN
        revision   a branch, made if there is none
        create_pr  propose the files to the owner of the repository
        tags       put into the card's metadata besides those that are always there

        max_shard_size is there for transformers' callers. What you wrote into the repository's README.md stays.
        Raises AdapterFileError that says what to do, and then the repository is as it was.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle; adapters are written as safetensors.")
        options = {
            "commit_message": commit_message,
            "commit_description": commit_description,
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
            "tags": tags,
        }
        return self._push(repo_id, list(self.peft_config), options)

    def _push(self, repo_id: str, names: list[str], options: Mapping[str, Any], **how: Any) -> "CommitInfo":
        if not names:
            raise AdapterNameError("There is nothing to push: the model has no adapter.")

        def save(folder: Path, card: Mapping[str, Any]) -> None:
            save_adapters(self.bare, names, folder, card=card, **how)

        return push_adapters(save, repo_id, [self.peft_config[name] for name in names], **options)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write README.md into a folder, or renew the sections of it that Veneer wrote.

        It says what the adapter is and how to load it, from the adapter's files if they lie in the folder, else from
        the model. A README.md that somebody else wrote keeps its text; its metadata gets what the hub needs.
        Raises AdapterNameError without an adapter.
        """
        overlay_needed(self.bare)
        card_of_model(self.bare, next(iter(self.peft_config)), Path(output_dir))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        subfolder: str | None = None,
        **hub: Any,
    ) -> "PeftModel":
        """A model with a saved adapter on it, for use (or, with `is_trainable`, to go on training).

        model_id  an adapter folder, or a hub id with `revision=`, `token=`, `cache_dir=`, … as on the hub

        low_cpu_mem_usage, torch_device, device_map, max_memory and offload_folder are there for PEFT's callers: the
        adapter goes where its layers are, and the model stays where it is.
        Raises AdapterFileError, ConfigError or TargetError, and then the model is as it was.
        """
        _refuse_second_facade(model)
        folder = adapter_folder(model_id, subfolder=subfolder, **_without_places(hub))
        loaded = load_adapter(
            model, adapter_name, folder, trainable=is_trainable, config=config, float32=autocast_adapter_dtype
        )
        facade = (task_class(loaded) if cls is PeftModel else cls)._over(model)
        return facade if is_trainable else facade.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        subfolder: str | None = None,
        **hub: Any,
    ) -> LoadResult:
        """Load one more adapter, which waits until `set_adapter`. It goes where its layers are.

        low_cpu_mem_usage, torch_device, device_map, max_memory and offload_folder are there for PEFT's callers.

        If there is an adapter of this name and of the same settings, it takes the saved values, as going on with a
        training run needs; what acts stays as it is.

        Returns empty lists of missing and unexpected keys, for PEFT's callers: there being some is an error.
        Raises what `from_pretrained` raises, and AdapterNameError if the name is taken by an adapter of other settings.
        """
        folder = adapter_folder(model_id, subfolder=subfolder, **_without_places(hub))
        if adapter_name in self.peft_config:
            restore(self.bare, adapter_name, folder, trainable=is_trainable)
        else:
            load_adapter(self.bare, adapter_name, folder, trainable=is_trainable, float32=autocast_adapter_dtype)
        return LoadResult([], [])

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """What each adapted module does. Raises AdapterNameError without an adapter."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """What the adapters do on the whole. Raises AdapterNameError without an adapter."""
        return get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers in the parameters."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        print(trainable_line(self))


class PeftModelForCausalLM(PeftModel):
    """For text generation."""


class PeftModelForSeq2SeqLM(PeftModel):
    """For sequence-to-sequence generation."""


class PeftModelForSequenceClassification(PeftModel):
    """For sequence classification; the head (`classifier` or `score`) is trained and saved too."""


class PeftModelForTokenClassification(PeftModel):
    """For token classification; the head (`classifier` or `score`) is trained and saved too."""


class PeftModelForQuestionAnswering(PeftModel):
    """For extractive question answering; the head (`qa_outputs`) is trained and saved too."""


class PeftModelForFeatureExtraction(PeftModel):
    """For embeddings."""


TASK_CLASSES: Mapping[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def task_class(config: LoraConfig) -> type[PeftModel]:
    """The class for a config's task, PeftModel if it names none."""
    return TASK_CLASSES[config.task_type] if isinstance(config.task_type, TaskType) else PeftModel


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = DEFAULT,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    generator: Generator | None = None,
) -> PeftModel:
    """Freeze a model and lay a new trainable adapter over it, in place.

    autocast_adapter_dtype  keep the adapter in float32 over a half-precision base
    revision                of the base model, noted in the adapter's config
    generator               where the adapter's random numbers come from

    Raises ConfigError, TargetError, AdapterNameError or AttachError, and then the model is as it was.

    >>> model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))  # doctest: +SKIP
    """
    if mixed:
        raise ConfigError("mixed=True mixes adapter methods other than LoRA, which Veneer does not have.")
    if not isinstance(peft_config, LoraConfig):
        raise ConfigError(f"peft_config must be a LoraConfig, not {type(peft_config).__name__}.")
    if revision is not None:
        peft_config = peft_config.changed(revision=revision)
    return task_class(peft_config)(
        model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, generator=generator
    )


def _without_places(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that say where PEFT puts an adapter."""
    return {name: value for name, value in options.items() if name not in _PLACES}


def _refuse_second_facade(model: nn.Module) -> None:
    if isinstance(model, PeftModel | LoraModel) or overlay_of(model) is not None:
        raise AttachError(
            "The model has adapters already. Call add_adapter or load_adapter on it for one more, or unload() first."
        )

"""PeftModel: a model with adapters that knows its task and its files, under PEFT's names."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Generator, nn

from veneer.config import LoraConfig, TaskType
from veneer.errors import AdapterNameError, AttachError, ConfigError, VeneerWarning
from veneer.layers.walk import modules_outside
from veneer.model.apply import add_adapter
from veneer.model.files import load_adapter
from veneer.model.overlay import DEFAULT, overlay_of
from veneer.model.pretrained import guard_saving, with_base_name
from veneer.model.report import count_parameters, trainable_line
from veneer.model.restore import restore
from veneer.model.saving_methods import SavingMethods
from veneer.model.sharded import on_all_ranks
from veneer.model.state_dict import LoadResult
from veneer.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from veneer.model.teach_trainer import teach_trainer
from veneer.model.teach_trl import teach_trl
from veneer.model.tuner import LoraModel
from veneer.storage.hub import adapter_folder

_PLACES = ("torch_device", "device_map", "max_memory", "offload_folder")


class PeftModel(SavingMethods):
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
        teach_libraries()

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
        return facade if is_trainable else _evaluating(facade)

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
        training run needs; what acts stays as it is. All ranks of a sharded model must call it; a new adapter comes
        before sharding.

        Returns empty lists of missing and unexpected keys, for PEFT's callers: there being some is an error.
        Raises what `from_pretrained` raises, and AdapterNameError if the name is taken by an adapter of other settings.
        """
        with on_all_ranks(self.bare, f"looking for {model_id}"):
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


def teach_libraries() -> None:
    """Let the trainers of transformers and TRL know models with adapters (decision 0007)."""
    teach_trainer(PeftModel)
    teach_trl(PeftModel)


def _evaluating(facade: "PeftModel") -> "PeftModel":
    """The facade in evaluation, where its model often is already; adapters are what their layers are."""
    if any(module.training for _, module in modules_outside(facade.bare)):
        return facade.eval()
    facade.training = facade.base_model.training = False
    return facade


def _refuse_second_facade(model: nn.Module) -> None:
    if isinstance(model, PeftModel | LoraModel) or overlay_of(model) is not None:
        raise AttachError(
            "The model has adapters already. Call add_adapter or load_adapter on it for one more, or unload() first."
        )

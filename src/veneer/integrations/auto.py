"""An adapter together with its base: load the transformers model that an adapter's config names, then the adapter."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch

from veneer.config import LoraConfig, TaskType
from veneer.errors import ArgumentError, ConfigError, VeneerWarning
from veneer.model.facade import PeftModel, task_class
from veneer.model.overlay import DEFAULT, overlay_needed
from veneer.model.renamed.file import read_renamed
from veneer.storage import keys
from veneer.storage.adapter_file import CONFIG_FILE, read_config, read_tensors, read_weights_header
from veneer.storage.hub import HUB_OPTIONS, adapter_folder, holds
from veneer.targets.names import inside, named
from veneer.targets.structure import embeddings

TOKENIZER_FILE = "tokenizer_config.json"

AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


class AutoPeftModel:
    """A saved adapter over the base its config names, by the task the config names: `from_pretrained` makes it.

    >>> model = veneer.AutoPeftModelForCausalLM.from_pretrained("adapter", device_map="auto")  # doctest: +SKIP
    """

    task: ClassVar[TaskType | None] = None

    def __init__(self) -> None:
        raise ArgumentError(f"{type(self).__name__} is not made itself: call {type(self).__name__}.from_pretrained.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        *,
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """The base and, on it, the adapter; for use (or, with `is_trainable`, to go on training).

        pretrained_model_name_or_path  an adapter folder, or a hub id
        revision, subfolder            of the adapter; the base's revision is in the config
        kwargs                         `token=`, `cache_dir=`, `local_files_only=`, `force_download=` for both; all
                                       others for the base's own from_pretrained (`dtype=`, `device_map=`, …)

        If a tokenizer lies beside the adapter and has more tokens than the base, the base's embeddings are resized
        and take the values that the adapter file has for them. Code of a repository is never run, unless you say
        trust_remote_code=True for the base.

        Raises AdapterFileError, ConfigError or TargetError, and what transformers raises for the base.
        """
        hub: dict[str, Any] = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs} | {"revision": revision}
        folder = adapter_folder(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        data = read_config(folder)
        config = config or LoraConfig.from_dict(data, source=str(folder / CONFIG_FILE))
        base, found = _load_base(cls, config, data, folder, kwargs)
        for place in dict.fromkeys((subfolder, None)):
            if holds(pretrained_model_name_or_path, TOKENIZER_FILE, subfolder=place, **hub):
                trusted = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
                tokens = _token_count(pretrained_model_name_or_path, place, {**hub, **trusted})
                _make_room(base, tokens, folder, config)
                break
        made = task_class(config) if cls.task is None else task_class(config.changed(task_type=cls.task))
        model = made.from_pretrained(
            base,
            folder,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        _warn_of_random(model, adapter_name, sorted(found["missing_keys"]))
        return model


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An adapter for text generation, over its base."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An adapter for sequence-to-sequence generation, over its base."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An adapter for sequence classification, over its base; the head comes from the adapter."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An adapter for token classification, over its base; the head comes from the adapter."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An adapter for extractive question answering, over its base; the head comes from the adapter."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An adapter for embeddings, over its base."""

    task = TaskType.FEATURE_EXTRACTION


def _load_base(
    cls: type[AutoPeftModel], config: LoraConfig, data: dict[str, Any], folder: Path, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(the base model, what transformers says about its loading)."""
    name = config.base_model_name_or_path
    if not name:
        raise ConfigError(
            f"{folder / CONFIG_FILE} does not name its base model (base_model_name_or_path): load the base yourself "
            "and call PeftModel.from_pretrained(base, folder)."
        )
    if (Path(name) / CONFIG_FILE).is_file():
        raise ConfigError(f"The base model {name} is an adapter folder itself; merge that adapter into its base first.")
    auto = _auto_class(cls, config, data, name, options)
    revision = {} if config.revision is None else {"revision": config.revision}
    return auto.from_pretrained(name, **{**options, **revision, "output_loading_info": True})


def _auto_class(
    cls: type[AutoPeftModel], config: LoraConfig, data: dict[str, Any], name: str, options: dict[str, Any]
) -> Any:
    """The transformers class to load the base with: by task, or else the one the adapter was trained over."""
    import transformers

    task = config.task_type if isinstance(config.task_type, TaskType) else None
    if cls.task is not None and task not in (None, cls.task):
        raise ConfigError(
            f"The adapter's task_type is {task}: call {_class_for(task)}.from_pretrained, or AutoPeftModel's."
        )
    if (wanted := cls.task or task) is not None:
        return getattr(transformers, AUTO_CLASSES[wanted])
    mapping = data.get("auto_mapping") or {}
    written, library = str(mapping.get("base_model_class")), str(mapping.get("parent_library", "transformers"))
    if library.partition(".")[0] != "transformers":
        raise ConfigError(
            f"The adapter's base is a {written} of {library}; only classes of transformers are loaded by name. Load "
            "the base yourself and call PeftModel.from_pretrained(base, folder)."
        )
    names = [written, *(_base_config(name, config, options).architectures or [])]
    found = next((getattr(transformers, one) for one in names if hasattr(transformers, one)), None)
    if found is None:
        raise ConfigError("The adapter's config names no task: call one of the AutoPeftModelFor… classes.")
    return found


def _base_config(name: str, config: LoraConfig, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    shared = {key: options[key] for key in (*HUB_OPTIONS, "trust_remote_code") if key in options}
    return AutoConfig.from_pretrained(name, **{**shared, "revision": config.revision or "main"})


def _class_for(task: TaskType) -> str:
    return next(one.__name__ for one in AutoPeftModel.__subclasses__() if one.task == task)


def _token_count(location: str | Path, subfolder: str | None, options: dict[str, Any]) -> int:
    from transformers import AutoTokenizer

    given = {name: value for name, value in options.items() if value is not None}
    if Path(location).exists():
        return len(AutoTokenizer.from_pretrained(str(Path(location) / (subfolder or "")), **given))
    return len(AutoTokenizer.from_pretrained(str(location), subfolder=subfolder or "", **given))


def _make_room(base: Any, tokens: int, folder: Path, config: LoraConfig) -> None:
    """Resize the embeddings to hold every token, with the values the adapter file has for them."""
    rows = base.get_input_embeddings().weight.shape[0] if hasattr(base, "get_input_embeddings") else tokens
    if tokens <= rows:
        return
    base.resize_token_embeddings(tokens)
    header, filled, random = read_weights_header(folder), [], []
    renamed = read_renamed(base, folder, config, header)
    if renamed is not None:
        config = renamed.config
    there = header.tensors if renamed is None else renamed.header.tensors
    for path in embeddings(base):
        weight = base.get_submodule(path).weight
        names = (keys.saved(path, "weight"), keys.base_weight(path))
        key = next((name for name in names if name in there), None)
        if named(config.modules_to_save or [], path) or any(weight is other for other in filled):
            continue
        filled.append(weight)
        if key is None:
            random.append(path)
        elif there[key].shape == tuple(weight.shape):
            given = read_tensors(folder, [key] if renamed is None else header.tensors)
            with torch.no_grad():
                weight.copy_((given if renamed is None else renamed.values(given))[key])
    if random and not config.trainable_token_indices:
        warnings.warn(
            f"The tokenizer beside the adapter has {tokens} tokens, the base {rows}: {', '.join(random)} got "
            f"{tokens - rows} new rows, and the adapter file has no values for them. They were not trained.",
            VeneerWarning,
            stacklevel=3,
        )


def _warn_of_random(model: PeftModel, name: str, missing: list[str]) -> None:
    """Say which weights neither the base's files nor the adapter's had."""
    saved = overlay_needed(model.bare).resolutions[name].saved
    random = [key for key in missing if not inside(key, saved)]
    if random:
        warnings.warn(
            f"Neither the base nor the adapter has values for {len(random)} tensors, which are random: "
            f"{', '.join(random[:3])}.",
            VeneerWarning,
            stacklevel=3,
        )

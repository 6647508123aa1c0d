"""Veneer: LoRA fine-tuning in Python on PyTorch. A thin trainable layer over a frozen model.

    from veneer import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model.print_trainable_parameters()

Names are loaded on first use, so that importing the package, or its command line, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from veneer._version import __version__

_HOMES = {
    "AutoPeftModel": "veneer.integrations.auto",
    "AutoPeftModelForCausalLM": "veneer.integrations.auto",
    "AutoPeftModelForFeatureExtraction": "veneer.integrations.auto",
    "AutoPeftModelForQuestionAnswering": "veneer.integrations.auto",
    "AutoPeftModelForSeq2SeqLM": "veneer.integrations.auto",
    "AutoPeftModelForSequenceClassification": "veneer.integrations.auto",
    "AutoPeftModelForTokenClassification": "veneer.integrations.auto",
    "CordaConfig": "veneer.config",
    "EvaConfig": "veneer.config",
    "ExtractedLora": "veneer.model.extraction",
    "Kind": "veneer.layers.kinds",
    "LoftQConfig": "veneer.config",
    "LoraConfig": "veneer.config",
    "LoraGAConfig": "veneer.config",
    "LoraModel": "veneer.model.tuner",
    "LoraRuntimeConfig": "veneer.config",
    "PeftConfig": "veneer.config",
    "PeftModel": "veneer.model.facade",
    "PeftModelForCausalLM": "veneer.model.facade",
    "PeftModelForFeatureExtraction": "veneer.model.facade",
    "PeftModelForQuestionAnswering": "veneer.model.facade",
    "PeftModelForSeq2SeqLM": "veneer.model.facade",
    "PeftModelForSequenceClassification": "veneer.model.facade",
    "PeftModelForTokenClassification": "veneer.model.facade",
    "PeftType": "veneer.config",
    "TaskType": "veneer.config",
    "TunerLayerStatus": "veneer.model.status",
    "TunerModelStatus": "veneer.model.status",
    "add_adapter": "veneer.integrations.transformers",
    "cast_mixed_precision_params": "veneer.model.precision",
    "convert_to_lora": "veneer.model.conversion",
    "create_lorafa_optimizer": "veneer.optimizers",
    "create_loraplus_optimizer": "veneer.optimizers",
    "extract_lora": "veneer.model.extraction",
    "fsdp_auto_wrap_policy": "veneer.distributed.wrap_policy",
    "get_base_model_state_dict": "veneer.model.state_dict",
    "get_eva_state_dict": "veneer.model.measure.eva",
    "get_layer_status": "veneer.model.status",
    "get_model_status": "veneer.model.status",
    "get_peft_model": "veneer.model.facade",
    "get_peft_model_state_dict": "veneer.model.state_dict",
    "hotswap_adapter": "veneer.model.hotswap",
    "hotswap_adapter_from_state_dict": "veneer.model.hotswap",
    "initialize_lora_eva_weights": "veneer.model.measure.eva",
    "inject_adapter_in_model": "veneer.model.inject",
    "install_as_peft": "veneer.integrations.as_peft",
    "load_adapter": "veneer.integrations.transformers",
    "load_peft_weights": "veneer.model.state_dict",
    "prepare_model_for_compiled_hotswap": "veneer.model.hotswap",
    "prepare_model_for_kbit_training": "veneer.model.precision",
    "preprocess_corda": "veneer.model.measure.corda",
    "preprocess_loraga": "veneer.model.measure.loraga",
    "register_kind": "veneer.layers.kinds",
    "replace_lora_weights_loftq": "veneer.model.measure.loftq",
    "rescale_adapter_scale": "veneer.model.scale",
    "save_as_lora": "veneer.model.conversion",
    "set_base_model_state_dict": "veneer.model.state_dict",
    "set_peft_model_state_dict": "veneer.model.state_dict",
    "shard": "veneer.distributed.shard",
}

if TYPE_CHECKING:
    from veneer.config import (
        CordaConfig,
        EvaConfig,
        LoftQConfig,
        LoraConfig,
        LoraGAConfig,
        LoraRuntimeConfig,
        PeftConfig,
        PeftType,
        TaskType,
    )
    from veneer.distributed.shard import shard
    from veneer.distributed.wrap_policy import fsdp_auto_wrap_policy
    from veneer.integrations.as_peft import install_as_peft
    from veneer.integrations.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from veneer.integrations.transformers import add_adapter, load_adapter
    from veneer.layers.kinds import Kind, register_kind
    from veneer.model.conversion import convert_to_lora, save_as_lora
    from veneer.model.extraction import ExtractedLora, extract_lora
    from veneer.model.facade import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from veneer.model.hotswap import (
        hotswap_adapter,
        hotswap_adapter_from_state_dict,
        prepare_model_for_compiled_hotswap,
    )
    from veneer.model.inject import inject_adapter_in_model
    from veneer.model.measure.corda import preprocess_corda
    from veneer.model.measure.eva import get_eva_state_dict, initialize_lora_eva_weights
    from veneer.model.measure.loftq import replace_lora_weights_loftq
    from veneer.model.measure.loraga import preprocess_loraga
    from veneer.model.precision import cast_mixed_precision_params, prepare_model_for_kbit_training
    from veneer.model.scale import rescale_adapter_scale
    from veneer.model.state_dict import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        load_peft_weights,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from veneer.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
    from veneer.model.tuner import LoraModel
    from veneer.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CordaConfig",
    "EvaConfig",
    "ExtractedLora",
    "Kind",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "__version__",
    "add_adapter",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "extract_lora",
    "fsdp_auto_wrap_policy",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "install_as_peft",
    "load_adapter",
    "load_peft_weights",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "register_kind",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shard",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

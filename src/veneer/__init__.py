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
    "TaskType": "veneer.config",
    "convert_to_lora": "veneer.model.conversion",
    "create_lorafa_optimizer": "veneer.optimizers",
    "create_loraplus_optimizer": "veneer.optimizers",
    "extract_lora": "veneer.model.extraction",
    "get_peft_model": "veneer.model.facade",
    "register_kind": "veneer.layers.kinds",
    "save_as_lora": "veneer.model.conversion",
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
        TaskType,
    )
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
    from veneer.model.tuner import LoraModel
    from veneer.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

__all__ = [
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
    "TaskType",
    "__version__",
    "convert_to_lora",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "extract_lora",
    "get_peft_model",
    "register_kind",
    "save_as_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

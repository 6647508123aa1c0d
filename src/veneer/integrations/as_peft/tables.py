"""PEFT's constants and tables, and its names for things that Veneer calls otherwise."""

from collections.abc import Mapping

from veneer.config import LoraConfig, PeftType
from veneer.errors import TargetError, VeneerError, VeneerWarning
from veneer.integrations.as_peft.functions import is_bnb_available, submodules
from veneer.model.facade import TASK_CLASSES, PeftModel
from veneer.model.tuner import LoraModel
from veneer.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE

CONFIG_NAME = CONFIG_FILE
SAFETENSORS_WEIGHTS_NAME = WEIGHTS_FILE
WEIGHTS_NAME = "adapter_model.bin"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"

PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[PeftType, type[LoraConfig]] = {PeftType.LORA: LoraConfig}
PEFT_TYPE_TO_TUNER_MAPPING: Mapping[PeftType, type[LoraModel]] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING: Mapping[PeftType, str] = {PeftType.LORA: LoraModel.prefix}
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[str, type[PeftModel]] = {str(task): cls for task, cls in TASK_CLASSES.items()}

PeftError = VeneerError
NoMatchingPeftModuleError = TargetError
PeftWarning = VeneerWarning

BaseTuner = LoraModel
is_bnb_4bit_available = is_bnb_available
_get_submodules = submodules

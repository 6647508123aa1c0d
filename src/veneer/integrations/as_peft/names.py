"""Which module of PEFT answers which name, and what that is in Veneer.

A name that `HOMES` does not have is a public one of Veneer.
"""

from collections.abc import Mapping

from veneer.integrations.as_peft.metadata import VERSION

_CONFIGS = "LoraConfig LoraRuntimeConfig LoftQConfig EvaConfig CordaConfig LoraGAConfig"
_MODELS = """
    PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM
    PeftModelForSequenceClassification PeftModelForTokenClassification
"""
_AUTO = """
    AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
    AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
"""
_EVA = "get_eva_state_dict initialize_lora_eva_weights"
_CONVERSION = "convert_to_lora save_as_lora"
_STATE = "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights"
_BASE_STATE = "get_base_model_state_dict set_base_model_state_dict"
_PREPARE = "prepare_model_for_kbit_training cast_mixed_precision_params"
_HOTSWAP = "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap"
_ERRORS = "PeftError NoMatchingPeftModuleError PeftWarning"
_QUANTISED = "Linear8bitLt Linear4bit"
_LAYERS = "LoraLayer Linear Embedding Conv1d Conv2d Conv3d ParamWrapper"
_WRAPPERS = "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper"
_ASKED_ABOUT = "PeftMixedModel PromptLearningConfig PrefixTuningConfig"
_MAPPINGS = "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING MODEL_TYPE_TO_PEFT_MODEL_MAPPING"
_PREFIXES = "PEFT_TYPE_TO_PREFIX_MAPPING"
_FILES = "CONFIG_NAME WEIGHTS_NAME SAFETENSORS_WEIGHTS_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND"
_OTHER = f"{_WRAPPERS} {_FILES} {_PREPARE} _get_submodules fsdp_auto_wrap_policy infer_device transpose"

# Where a name that is no public one of Veneer lies.
HOMES: Mapping[str, str] = {
    name: home
    for home, names in {
        "veneer.integrations.as_peft.classes": f"""
            BaseTunerLayer {_LAYERS} {_QUANTISED} {_WRAPPERS} {_ASKED_ABOUT} LoHaLayer LoKrLayer
        """,
        "veneer.integrations.as_peft.functions": """
            cast_adapter_dtype check_hotswap_configs_compatible check_if_peft_model delete_adapter
            disable_input_dtype_casting get_peft_config infer_device is_bnb_available set_adapter
            set_requires_grad transpose
        """,
        "veneer.integrations.as_peft.tables": f"""
            {_MAPPINGS} {_PREFIXES} {_FILES} {_ERRORS} _get_submodules BaseTuner is_bnb_4bit_available
        """,
    }.items()
    for name in names.split()
}

# What each module answers. Everything PEFT exports lies in `peft` itself; the others are where programs look, too.
MODULES: Mapping[str, tuple[str, ...]] = {
    name: tuple(names.split())
    for name, names in {
        "peft": f"""
            {_CONFIGS} {_MODELS} {_AUTO} {_EVA} {_CONVERSION} {_STATE} {_BASE_STATE} {_PREPARE} {_ERRORS} {_ASKED_ABOUT}
            {_MAPPINGS} LoraModel PeftConfig PeftType TaskType get_peft_config get_peft_model get_layer_status
            get_model_status inject_adapter_in_model preprocess_loraga replace_lora_weights_loftq
        """,
        "peft.auto": _AUTO,
        "peft.config": f"PeftConfig {_ASKED_ABOUT.split()[1]}",
        "peft.functional": """
            cast_adapter_dtype delete_adapter get_peft_model_state_dict inject_adapter_in_model set_adapter
            set_peft_model_state_dict set_requires_grad
        """,
        "peft.helpers": "check_if_peft_model disable_input_dtype_casting rescale_adapter_scale",
        "peft.import_utils": "is_bnb_available is_bnb_4bit_available",
        "peft.mapping": f"{_MAPPINGS} {_PREFIXES} get_peft_config get_peft_model inject_adapter_in_model",
        "peft.mapping_func": "get_peft_model",
        "peft.mixed_model": "PeftMixedModel",
        "peft.optimizers": "create_loraplus_optimizer create_lorafa_optimizer",
        "peft.peft_model": f"{_MODELS} {_STATE} PeftConfig get_layer_status get_model_status",
        "peft.tuners": f"{_CONFIGS} {_EVA} {_CONVERSION} LoraModel preprocess_loraga",
        "peft.tuners.loha": "LoHaLayer",
        "peft.tuners.loha.layer": "LoHaLayer",
        "peft.tuners.lokr": "LoKrLayer",
        "peft.tuners.lokr.layer": "LoKrLayer",
        "peft.tuners.lora": f"{_CONFIGS} {_EVA} {_CONVERSION} {_LAYERS} {_QUANTISED} LoraModel preprocess_loraga",
        "peft.tuners.lora.bnb": _QUANTISED,
        "peft.tuners.lora.config": _CONFIGS,
        "peft.tuners.lora.conversion": _CONVERSION,
        "peft.tuners.lora.corda": "preprocess_corda",
        "peft.tuners.lora.eva": _EVA,
        "peft.tuners.lora.layer": _LAYERS,
        "peft.tuners.lora.loraga": "preprocess_loraga",
        "peft.tuners.lora.model": "LoraModel",
        "peft.tuners.tuners_utils": """
            BaseTuner BaseTunerLayer cast_adapter_dtype delete_adapter set_adapter set_requires_grad
        """,
        "peft.utils": f"{_OTHER} {_STATE} {_BASE_STATE} {_ERRORS} PeftType TaskType replace_lora_weights_loftq",
        "peft.utils.constants": _FILES,
        "peft.utils.hotswap": f"{_HOTSWAP} check_hotswap_configs_compatible",
        "peft.utils.integrations": "",
        "peft.utils.loftq_utils": "replace_lora_weights_loftq",
        "peft.utils.other": _OTHER,
        "peft.utils.peft_types": "PeftType TaskType",
        "peft.utils.save_and_load": _STATE,
    }.items()
}

# What each module is asked for besides.
FACTS: Mapping[str, str] = {"__version__": VERSION}

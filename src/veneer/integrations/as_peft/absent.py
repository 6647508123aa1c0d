"""What PEFT has and Veneer has not, and what to use in its place."""

import re
from collections.abc import Mapping

from veneer.suggest import did_you_mean

INSTEAD: Mapping[str, str] = {
    "AdaLoraConfig": "LoraConfig with rank_pattern, or init_lora_weights='eva', gives layers ranks of their own",
    "LNTuningConfig": "name the norms in modules_to_save of a LoraConfig",
    "TrainableTokensConfig": "LoraConfig has trainable_token_indices",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": "target_modules=None finds the layers of any architecture",
    "prepare_model_for_int8_training": "its name is prepare_model_for_kbit_training now, in PEFT, too",
    "register_peft_method": "a new kind of layer is one line: veneer.register_kind",
    "dequantize_module_weight": "model.dequantize() of transformers",
    "dequantize_bnb_weight": "model.dequantize() of transformers",
    "check_adapters_to_merge": "layers of your own are registered by veneer.register_kind",
    "shift_tokens_right": "transformers has it",
    "get_peft_model_config": "model.peft_config",
    "create_arrow_model": "load the adapters and name one for each row: adapter_names=[…]",
    "build_peft_weight_mapping": "veneer.load_adapter renames by itself",
}
_METHOD = re.compile(r"(Config|Model|Encoder|Embedding|Init|Layer)$")


def why_absent(module: str, name: str, there: list[str]) -> str:
    """What to say of a name that `module` does not answer."""
    said = f"module '{module}' has no attribute {name!r}"
    if name.startswith("__"):
        return said
    instead = INSTEAD.get(name)
    if instead is None and (hint := did_you_mean(name, there)) and not _METHOD.search(name):
        return f"{said}{hint}"
    reason = instead or "Veneer has LoRA and what belongs to it, and no other method"
    return f"{said}: this is Veneer under PEFT's name ({reason}; see docs/migrate.md)."

"""What is trained under DeepSpeed as in one process: settings of the latter, with half the batch in each of two."""

from typing import Any

COMMON: dict[str, Any] = {"batch_size": 2, "max_steps": None, "epochs": 1, "data": {"eval_fraction": 0.3}}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"stages": (2, 3), "settings": {"eval_every": 2}},
    "loraplus": {
        "stages": (2,),
        "settings": {"optimizer": "loraplus", "learning_rate": 1e-4, "weight_decay": 0.1, "gradient_accumulation": 2},
    },
    "nf4": {"stages": (2,), "settings": {"quantization": "nf4"}},
    "copies": {"stages": (2, 3), "settings": {"lora": {"modules_to_save": ["lm_head"], "use_dora": True}}},
    "embedding": {
        "stages": (3,),
        "settings": {"lora": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj"]}},
    },
    "tokens": {
        "stages": (3,),
        "settings": {"lora": {"trainable_token_indices": [5, 6, 7], "init_lora_weights": "pissa"}},
    },
    "dora": {
        "stages": (3,),
        "settings": {
            "lora": {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "use_dora": True},
            "gradient_checkpointing": True,
            "group_by_length": False,
        },
    },
    "bfloat16": {"stages": (3,), "settings": {"dtype": "bfloat16", "max_steps": 2, "epochs": None}},
}
# bfloat16 rounds sums of rows by how the rows are shared out
NEAR = {"bfloat16": 0.05}

# a run stopped after three of its six steps, and going on; its checkpoint is that of step 2
_STEADY: dict[str, Any] = {"schedule": "constant", "epochs": None, "save_every": 2}
HALVES: tuple[dict[str, Any], ...] = ({**_STEADY, "max_steps": 3}, {**_STEADY, "max_steps": 6, "resume": True})
WHOLE: dict[str, Any] = {**_STEADY, "max_steps": 6}

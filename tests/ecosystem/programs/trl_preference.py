"""TRL's DPOTrainer, KTOTrainer, RewardTrainer and GRPOTrainer, with `peft_config` and with a PeftModel."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from fixed_values import digest, fill, losses, names, said
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)

from train.tiny_chat import model as tiny_model
from train.tiny_chat import tokenizer

folder = Path(sys.argv[1])
disable_progress_bars()
logging.set_verbosity_error()
tokens = tokenizer()
WORDS = ["red", "green", "blue", "white", "black", "grey"]
pairs = Dataset.from_list(
    [{"prompt": f"say {word}", "chosen": f" {word}!", "rejected": f" not {word}"} for word in WORDS * 2]
)
judged = Dataset.from_list(
    [{"prompt": f"say {word}", "completion": f" {word}!", "label": at % 2 == 0} for at, word in enumerate(WORDS * 2)]
)
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "seed": 0,
}


def config(**more) -> LoraConfig:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**fields, **more})


def judge() -> LlamaForSequenceClassification:
    """A model with a head of one number."""
    own = LlamaConfig(**{**tiny_model().config.to_dict(), "num_labels": 1})
    torch.manual_seed(0)
    return LlamaForSequenceClassification(own)


def adapted(**more) -> PeftModel:
    """A model that was trained before, as one comes from SFT."""
    made = get_peft_model(tiny_model(), config(**more))
    fill(made)
    return made


def trained(kind, arguments, name: str, *, model=None, data=pairs, peft_config=None, more=None, **also) -> list:
    """[losses, digest of the adapter] of a short run whose adapter begins with the same numbers everywhere."""
    trainer = kind(
        model=tiny_model() if model is None else model,
        args=arguments(output_dir=str(folder / name), **{**COMMON, **(more or {})}),
        train_dataset=data,
        processing_class=tokens,
        peft_config=peft_config,
        **also,
    )
    if peft_config is not None:
        fill(trainer.model)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found[f"{name}: margins"] = [round(entry[key], 5) for entry in logs for key in entry if key == "rewards/margins"]
    found[f"{name}: adapters"] = sorted(trainer.model.peft_config)
    return [losses(trainer), digest(trainer.model)]


def dpo(name: str, **options) -> list:
    return trained(DPOTrainer, DPOConfig, name, **options)


def short(completions: list[str], **_) -> list[float]:
    """A toy reward."""
    return [-float(len(completion)) for completion in completions]


found: dict[str, object] = {}
with said() as found["warnings"]:
    found["dpo"] = dpo("dpo", peft_config=config(), more={"save_strategy": "steps", "save_steps": 3})
    found["dpo files"] = names(folder / "dpo" / "checkpoint-3")
    found["dpo drop"] = dpo("drop", peft_config=config(lora_dropout=0.5))  # which DPO switches off
    found["dpo before"] = dpo("before", peft_config=config(), more={"precompute_ref_log_probs": True})
    found["dpo explicit"] = dpo("explicit", peft_config=config(), ref_model=tiny_model())

    model = adapted()
    start = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    found["dpo ref"] = dpo("ref", model=model, more={"save_strategy": "steps", "save_steps": 3})
    reference = get_peft_model_state_dict(model, adapter_name="ref")
    found["ref stays"] = all(torch.equal(start[key], reference[key]) for key in start)
    found["ref files"] = names(folder / "ref" / "checkpoint-3")
    found["acts"] = model.active_adapter
    found["trains"] = sorted({name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad})
    model = adapted(modules_to_save=["lm_head"], use_dora=True)
    found["dpo head"] = dpo("head", model=model)

    found["kto"] = trained(KTOTrainer, KTOConfig, "kto", data=judged, peft_config=config())
    found["kto ref"] = trained(KTOTrainer, KTOConfig, "kto ref", data=judged, model=adapted())

    model = judge()
    rewards = Dataset.from_list([{"chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs])
    found["reward"] = trained(
        RewardTrainer,
        RewardConfig,
        "reward",
        model=model,
        data=rewards,
        peft_config=config(task_type="SEQ_CLS"),
        more={"save_strategy": "steps", "save_steps": 3},
    )
    found["reward files"] = names(folder / "reward" / "checkpoint-3")
    again = PeftModel.from_pretrained(judge(), folder / "reward" / "checkpoint-3").eval()
    INPUT = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        found["reward reloads"] = torch.allclose(again(INPUT).logits, model.eval()(INPUT).logits, atol=1e-6)

    found["grpo"] = trained(
        GRPOTrainer,
        GRPOConfig,
        "grpo",
        data=Dataset.from_list([{"prompt": f"say {word}"} for word in WORDS]),
        peft_config=config(),
        reward_funcs=short,
        more={"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "max_steps": 2},
    )

print(json.dumps(found))

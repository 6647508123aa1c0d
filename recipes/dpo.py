"""Teach a chat model to answer without chatter: preferences (DPO) with TRL on a model with an adapter.

Model  SmolLM2-135M-Instruct, or any other chat model
Data   the addresses that come with Veneer; the bare JSON is preferred to the same JSON after a polite sentence
Time   about two minutes on two CPU cores, by estimate; seconds with --tiny

DPO compares the model with a frozen one. precompute_ref_log_probs asks the model itself before the first step, when
the adapter adds nothing yet: exact, and no second model is kept. So the loss starts at ln 2.
"""

import argparse
import json
import math
from typing import Any

import addresses
import tiny_models
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from veneer import LoraConfig, get_peft_model


def preferences(split: str, count: int) -> Dataset:
    """`prompt`, `chosen` and `rejected`, each a list of messages."""

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": turn("user", row["prompt"]),
                "chosen": turn("assistant", row["completion"]),
                "rejected": turn("assistant", f"Sure, here is the address: {row['completion']}"),
            }
            for row in addresses.rows(split, count)
        ]
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="adapters/dpo")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rows, options.learning_rate = tiny_models.causal_lm(), 24, 2e-3
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trained, total = model.get_nb_trainable_parameters()

    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=f"{options.output}/run",
            num_train_epochs=1,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=4,
            precompute_ref_log_probs=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=preferences("train", options.rows),
        eval_dataset=preferences("test", 8),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    assert abs(before - math.log(2)) < 1e-4, f"The loss starts at {before:.5f}, not at ln 2."
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.9 * before, f"The loss went from {before:.3f} to {after['eval_loss']:.3f}."
    model.save_pretrained(options.output, selected_adapters=["default"])
    scores = {"loss_before": before, "loss_after": after["eval_loss"]}
    return {"trainable": trained, "total": total, **scores, "preferred_after": after["eval_rewards/accuracies"]}


if __name__ == "__main__":
    print(json.dumps(main()))

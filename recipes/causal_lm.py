"""Teach a chat model to turn a US address into JSON: LoRA on a causal language model with transformers' Trainer.

Model  SmolLM2-135M-Instruct, or any other chat model of the hub or a folder
Data   128 of the addresses that come with Veneer; only the answer is trained on
Time   about two minutes on two CPU cores, by estimate (16 steps of 8 rows); seconds with --tiny
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from veneer import LoraConfig, PeftModel, get_peft_model


def tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """A question and its answer; -100 keeps the question out of the loss."""
    turns = [{"role": "user", "content": row["prompt"]}]
    question = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(question, add_special_tokens=False).input_ids
    answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, save, load again. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="adapters/causal_lm")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rows, options.learning_rate = tiny_models.causal_lm(), 64, 2e-2
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    settings = TrainingArguments(
        output_dir=f"{options.output}/run",
        num_train_epochs=1,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    rows = {
        "train_dataset": [tokens(row, tokenizer) for row in addresses.rows("train", options.rows)],
        "eval_dataset": [tokens(row, tokenizer) for row in addresses.rows("test", 32)],
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }
    trainer = Trainer(model, settings, **rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.9 * before, f"The loss on unseen addresses went from {before:.3f} to {after:.3f}."

    model.save_pretrained(options.output)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.model), options.output)
    loaded = Trainer(again, settings, **rows).evaluate()["eval_loss"]
    assert abs(loaded - after) < 1e-4, f"Saved with a loss of {after:.5f}, loaded with {loaded:.5f}."
    trained, total = model.get_nb_trainable_parameters()
    return {"trainable": trained, "total": total, "loss_before": before, "loss_after": after}


if __name__ == "__main__":
    print(json.dumps(main()))

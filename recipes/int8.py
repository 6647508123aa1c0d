"""Train an adapter over a model in 8 bits: half the memory of bfloat16, so a larger model fits.

Model  SmolLM2-1.7B-Instruct, or any other causal language model (8 bits by bitsandbytes; runs on a CPU, too)
Data   64 of the addresses that come with Veneer
Time   about a minute on a GPU, by estimate; seconds with --tiny
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from veneer import LoraConfig, get_peft_model, prepare_model_for_kbit_training


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-1.7B-Instruct")
    parser.add_argument("--output", default="adapters/int8")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rows, options.learning_rate = tiny_models.causal_lm(), 32, 1e-2
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="auto"
    )
    assert torch.int8 in {parameter.dtype for parameter in base.parameters()}
    base = prepare_model_for_kbit_training(base)  # norms in float32, gradients recomputed from checkpoints
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    def read(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(f"{row['prompt']}\n{row['completion']}").input_ids}

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{options.output}/run",
            num_train_epochs=1,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=[read(row) for row in addresses.rows("train", options.rows)],
        eval_dataset=[read(row) for row in addresses.rows("test", 8)],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.95 * before, f"The loss on unseen addresses went from {before:.3f} to {after:.3f}."
    model.save_pretrained(options.output)
    trained, total = model.get_nb_trainable_parameters()
    return {"trainable": trained, "total": total, "loss_before": before, "loss_after": after}


if __name__ == "__main__":
    print(json.dumps(main()))

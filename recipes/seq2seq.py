"""Teach an encoder-decoder to name the parts of a US address: LoRA on a sequence-to-sequence model.

Model  flan-t5-small, or any other model of AutoModelForSeq2SeqLM
Data   the 1,000 addresses that come with Veneer, as "number: 75 | street: Main St" (T5 has no word for a brace)
Time   about ten minutes on two CPU cores; seconds with --tiny
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from veneer import LoraConfig, TaskType, get_peft_model


def tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """The address is read, its parts are to be written."""
    parts = " | ".join(f"{part}: {value}" for part, value in row["parts"].items())
    return {
        "input_ids": tokenizer(f"Parts of the address: {row['address']}").input_ids,
        "labels": tokenizer(text_target=parts).input_ids,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/flan-t5-small")
    parser.add_argument("--output", default="adapters/seq2seq")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rows, options.learning_rate = tiny_models.seq2seq(), 64, 2e-2
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForSeq2SeqLM.from_pretrained(options.model)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"], task_type=TaskType.SEQ_2_SEQ_LM)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            output_dir=f"{options.output}/run",
            num_train_epochs=2,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=[tokens(row, tokenizer) for row in addresses.rows("train", options.rows)],
        eval_dataset=[tokens(row, tokenizer) for row in addresses.rows("test", 32)],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.95 * before, f"The loss on unseen addresses went from {before:.3f} to {after:.3f}."

    question = tokenizer("Parts of the address: 75 Main St, Ames, IA", return_tensors="pt").to(model.device)
    written = model.generate(**question, max_new_tokens=40)
    print(tokenizer.decode(written[0], skip_special_tokens=True))
    model.save_pretrained(options.output)
    trained, total = model.get_nb_trainable_parameters()
    return {"trainable": trained, "total": total, "loss_before": before, "loss_after": after}


if __name__ == "__main__":
    print(json.dumps(main()))

"""Teach an encoder to tell which addresses name a unit (a flat, suite or floor): LoRA and a new head.

Model  MiniLM (all-MiniLM-L6-v2, 22 M parameters), or any other encoder
Data   the 1,000 addresses that come with Veneer; 41 % of them name a unit
Time   about a minute on two CPU cores; seconds with --tiny

The head is new, so it is trained and saved whole: task_type="SEQ_CLS" sees to that.
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from veneer import LoraConfig, PeftModel, get_peft_model


def accuracy(predicted: Any) -> dict[str, float]:
    """The share of rows that are told rightly."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, save, load again. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--output", default="adapters/sequence_classification")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rows, options.learning_rate = tiny_models.encoder(), 128, 2e-2
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"))
    model.print_trainable_parameters()

    def read(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(row["address"]).input_ids, "labels": int("unit" in row["parts"])}

    settings = TrainingArguments(
        output_dir=f"{options.output}/run",
        num_train_epochs=3,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
    )
    rows = {
        "train_dataset": [read(row) for row in addresses.rows("train", options.rows)],
        "eval_dataset": [read(row) for row in addresses.rows("test")],
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
    }
    trainer = Trainer(model, settings, **rows)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"], f"The loss went from {before} to {after}."
    model.save_pretrained(options.output)

    # its head is random again: the adapter brings the trained one
    fresh = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    loaded = Trainer(PeftModel.from_pretrained(fresh, options.output), settings, **rows).evaluate()
    assert loaded["eval_accuracy"] == after["eval_accuracy"]
    trained, total = model.get_nb_trainable_parameters()
    scores = {"loss_before": before["eval_loss"], "loss_after": after["eval_loss"]}
    shares = {"accuracy_before": before["eval_accuracy"], "accuracy_after": after["eval_accuracy"]}
    return {"trainable": trained, "total": total, **scores, **shares}


if __name__ == "__main__":
    print(json.dumps(main()))

"""Teach an encoder to tag each word of a US address with the part it belongs to: LoRA on token classification.

Model  MiniLM (all-MiniLM-L6-v2, 22 M parameters), or any other encoder
Data   the 1,000 addresses that come with Veneer, eight kinds of parts
Time   about a minute on two CPU cores; seconds with --tiny
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from veneer import LoraConfig, TaskType, get_peft_model

NAMES = ["none", *addresses.PARTS]


def tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """The tag of a word stands at its first token; -100 keeps the others out of the loss."""
    words, tags = addresses.tagged(row)
    read = tokenizer(words, is_split_into_words=True)
    places = read.word_ids()
    first = [at is not None and (here == 0 or at != places[here - 1]) for here, at in enumerate(places)]
    labels = [tags[at] if begins else -100 for at, begins in zip(places, first, strict=True)]
    return {"input_ids": read.input_ids, "labels": labels}


def accuracy(predicted: Any) -> dict[str, float]:
    """The share of words that are tagged rightly."""
    counted = predicted.label_ids != -100
    right = predicted.predictions.argmax(-1) == predicted.label_ids
    return {"accuracy": float(right[counted].mean())}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--output", default="adapters/token_classification")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rows, options.learning_rate = tiny_models.encoder(), 64, 1e-2
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: at for at, name in enumerate(NAMES)}}
    base = AutoModelForTokenClassification.from_pretrained(options.model, **labels)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["query", "key", "value"], task_type=TaskType.TOKEN_CLS)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{options.output}/run",
            num_train_epochs=3,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=[tokens(row, tokenizer) for row in addresses.rows("train", options.rows)],
        eval_dataset=[tokens(row, tokenizer) for row in addresses.rows("test")],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > before["eval_accuracy"], f"From {before} to {after}."
    model.save_pretrained(options.output)
    trained, total = model.get_nb_trainable_parameters()
    scores = {"loss_before": before["eval_loss"], "loss_after": after["eval_loss"]}
    shares = {"accuracy_before": before["eval_accuracy"], "accuracy_after": after["eval_accuracy"]}
    return {"trainable": trained, "total": total, **scores, **shares}


if __name__ == "__main__":
    print(json.dumps(main()))

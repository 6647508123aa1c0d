"""Teach a vision transformer new classes of pictures: LoRA on attention, and a new head trained whole.

Model  ViT base (google/vit-base-patch16-224-in21k), or any other model of AutoModelForImageClassification
Data   beans: 1,034 photographs of leaves, healthy or with one of two diseases; any set with `image` and `labels`
Time   some minutes on a GPU; seconds with --tiny (a tiny random model, coloured squares)
"""

import argparse
import json
from typing import Any

import tiny_data
import tiny_models
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from veneer import LoraConfig, get_peft_model


def accuracy(predicted: Any) -> dict[str, float]:
    """The share of pictures that are told rightly."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k")
    parser.add_argument("--data", default="AI-Lab-Makerere/beans")
    parser.add_argument("--output", default="adapters/image_classification")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    set_seed(0)
    if options.tiny:
        options.model, rows = tiny_models.vision(), {"train": tiny_data.pictures(96), "test": tiny_data.pictures(32, 1)}
    else:
        rows = load_dataset(options.data)

    processor = AutoImageProcessor.from_pretrained(options.model)
    base = AutoModelForImageClassification.from_pretrained(options.model, num_labels=1 + max(rows["train"]["labels"]))
    # without a task type, the head is named by hand
    config = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = processor([row["image"].convert("RGB") for row in batch], return_tensors="pt")
        return {**pictures, "labels": torch.tensor([row["labels"] for row in batch])}

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{options.output}/run",
            num_train_epochs=3,
            learning_rate=5e-3,
            per_device_train_batch_size=16,
            remove_unused_columns=False,  # `image` is read by collate, not by the model
            label_names=["labels"],
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=collate,
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

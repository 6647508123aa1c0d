"""Adapt a transformers model in place: it stays a PreTrainedModel, and the stock Trainer saves and resumes its adapter.

Model  SmolLM2-135M-Instruct, or any other causal language model
Data   64 of the addresses that come with Veneer
Time   about two minutes on two CPU cores, by estimate; seconds with --tiny

The run is stopped half way and resumed from its checkpoint, which holds the adapter alone. It ends with the same loss
as a run that was never stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import addresses
import tiny_models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from veneer import LoraConfig, add_adapter, load_adapter


class StopAt(TrainerCallback):
    """Stop after some steps, as a lost machine would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asked after each step."""
        control.should_training_stop = state.global_step >= self.step


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, stop, resume, load into a fresh model. Returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="adapters/in_place")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model = tiny_models.causal_lm()

    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def rows(split: str, count: int) -> list[dict[str, Any]]:
        texts = [f"{row['prompt']}\n{row['completion']}" for row in addresses.rows(split, count)]
        return [{"input_ids": tokenizer(text).input_ids} for text in texts]

    def trainer(run: str, *callbacks: TrainerCallback) -> Trainer:
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(options.model)
        add_adapter(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"))
        settings = TrainingArguments(
            output_dir=f"{options.output}/{run}",
            max_steps=8,
            save_steps=4,
            learning_rate=1e-2 if options.tiny else 1e-3,
            per_device_train_batch_size=8,
            report_to="none",
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return Trainer(model, settings, collator, rows("train", 64), rows("test", 16), callbacks=list(callbacks))

    before = trainer("untrained").evaluate()["eval_loss"]
    whole = trainer("whole")
    whole.train()
    after = whole.evaluate()["eval_loss"]
    assert after < before, f"The loss on unseen addresses went from {before:.3f} to {after:.3f}."

    trainer("stopped", StopAt(4)).train()
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.evaluate()["eval_loss"] == after, "The resumed run ended elsewhere."
    saved = {file.name for file in Path(f"{options.output}/stopped/checkpoint-8").iterdir()}
    assert "adapter_model.safetensors" in saved, f"The checkpoint holds {sorted(saved)}."
    assert "model.safetensors" not in saved, f"The checkpoint holds {sorted(saved)}."

    resumed.model.save_pretrained(options.output)
    fresh = AutoModelForCausalLM.from_pretrained(options.model)
    load_adapter(fresh, options.output)
    loaded = Trainer(fresh, whole.args, whole.data_collator, eval_dataset=whole.eval_dataset).evaluate()["eval_loss"]
    assert abs(loaded - after) < 1e-4, f"Saved with a loss of {after:.5f}, loaded with {loaded:.5f}."
    return {"loss_before": before, "loss_after": after}


if __name__ == "__main__":
    print(json.dumps(main()))

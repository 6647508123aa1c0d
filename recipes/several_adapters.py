"""Several adapters on one model: train two, switch, mix them in one batch, add them up, turn them off.

Model  SmolLM2-135M-Instruct, or any other causal language model
Data   the addresses that come with Veneer: one adapter answers with JSON, the other with the ZIP code alone
Time   about two minutes on two CPU cores, by estimate; seconds with --tiny
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from veneer import LoraConfig, get_peft_model


def batch(tokenizer: Any, prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """Rows of prompt and answer; the loss counts everything but padding."""
    texts = [f"{prompt}\n{answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    read = tokenizer(texts, padding=True, return_tensors="pt")
    labels = read.input_ids.masked_fill(read.attention_mask == 0, -100)
    return {"input_ids": read.input_ids, "attention_mask": read.attention_mask, "labels": labels}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train both, and hold each way of using them to what it promises. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="adapters/several")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model = tiny_models.causal_lm()
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.padding_side = "right"
    rows = [row for row in addresses.rows("train", 40) if "zip" in row["parts"]][:8]
    prompts = [row["prompt"] for row in rows]
    tasks = {
        "json": batch(tokenizer, prompts, [row["completion"] for row in rows]),
        "zip": batch(tokenizer, prompts, [row["parts"]["zip"] for row in rows]),
    }
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), config, adapter_name="json")
    model.add_adapter("zip", config)

    def loss(task: str) -> float:
        with torch.no_grad():
            return model(**tasks[task]).loss.item()

    model.eval()
    before = {task: loss(task) for task in tasks}
    for task in tasks:
        model.set_adapter(task)  # only this adapter acts and is trained
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        for _ in range(10):
            model(**tasks[task]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = {}
    outputs = {}
    for task in tasks:
        model.set_adapter(task)
        after[task] = loss(task)
        assert after[task] < before[task], f"{task}: the loss went from {before[task]:.3f} to {after[task]:.3f}."
        outputs[task] = model(**tasks["json"]).logits.detach()

    # each row of one batch with an adapter of its own
    which = ["json", "zip"] * 4
    mixed = model(**tasks["json"], adapter_names=which).logits.detach()
    for row, name in enumerate(which):
        torch.testing.assert_close(mixed[row], outputs[name][row], rtol=1e-3, atol=1e-4)

    # the sum of both, each at half weight
    model.add_weighted_adapter(["json", "zip"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    both = {task: loss(task) for task in tasks}
    assert all(both[task] < before[task] for task in tasks), f"{both} is not better than {before}."

    with model.disable_adapter():
        assert abs(loss("json") - before["json"]) < 1e-4
    model.save_pretrained(options.output)  # a folder for each
    return {"loss_before": before, "loss_after": after, "loss_of_both_after": both}


if __name__ == "__main__":
    print(json.dumps(main()))

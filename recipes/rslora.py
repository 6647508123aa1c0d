"""High ranks and rsLoRA: the same rank and alpha, scaled by alpha / r or by alpha / sqrt(r).

Model  SmolLM2-135M-Instruct, or any other causal language model
Data   one batch of the addresses that come with Veneer
Time   about a minute on two CPU cores; seconds with --tiny

LoRA adds scale · B A x. With alpha / r the scale falls as the rank grows, and so does what a step can change, so that a
high rank learns hardly faster than a low one. With alpha / sqrt(r) the first gradient is sqrt(64) = 8 times as long.
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from veneer import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

CONFIGS = {
    "basic": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
    "all_linear": {"r": 64, "lora_alpha": 128, "target_modules": "all-linear"},
    "rslora": {"r": 64, "lora_alpha": 128, "target_modules": "all-linear", "use_rslora": True},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train each for some steps, from one start. Returns what was counted and measured of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="adapters/rslora")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.learning_rate = tiny_models.causal_lm(), 1e-3
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [f"{row['prompt']}\n{row['completion']}" for row in addresses.rows("train", 4)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)

    found: dict[str, dict[str, Any]] = {}
    gradients, start = {}, None
    for name, settings in CONFIGS.items():
        base = AutoModelForCausalLM.from_pretrained(options.model)
        model = get_peft_model(base, LoraConfig(**settings, task_type=TaskType.CAUSAL_LM))
        model.print_trainable_parameters()
        if name == "all_linear":
            start = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
        if name == "rslora":
            set_peft_model_state_dict(model, start)  # the same A, so that only the scale differs

        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate)
        losses = []
        for step in range(6):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            if step == 0:
                gradients[name] = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], f"{name}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}."
        model.save_pretrained(f"{options.output}/{name}")
        trained, _ = model.get_nb_trainable_parameters()
        found[name] = {"trainable": trained, "loss_before": losses[0], "loss_after": losses[-1]}

    ratio = gradients["rslora"] / gradients["all_linear"]
    assert abs(ratio - 64**0.5) < 1e-2, f"The first gradient is {ratio:.3f} times as long."
    assert found["rslora"]["loss_after"] < found["all_linear"]["loss_after"]
    return {**found, "gradient_ratio": round(ratio, 4)}


if __name__ == "__main__":
    print(json.dumps(main()))

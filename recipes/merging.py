"""Merge an adapter into its model for deployment: a plain model that needs no adapter library, with the same answers.

Model  SmolLM2-135M-Instruct, or any other causal language model
Data   one batch of the addresses that come with Veneer, to have an adapter that does something
Time   about a minute on two CPU cores; seconds with --tiny
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from veneer import LoraConfig, PeftModel, get_peft_model


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train for some steps, save the adapter, merge it, save the plain model, load that. Returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="adapters/merging")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model = tiny_models.causal_lm()
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [f"{row['prompt']}\n{row['completion']}" for row in addresses.rows("train", 8)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)

    base = AutoModelForCausalLM.from_pretrained(options.model)
    names = set(base.state_dict())
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f}."
    model.save_pretrained(options.output)

    # merging usually starts here, from a base in full precision (not from a quantised one) and a saved adapter
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.model), options.output)
    with torch.no_grad():
        wanted = adapted(**batch).logits
    plain = adapted.merge_and_unload(safe_merge=True)  # safe: refuses weights that are not finite
    assert set(plain.state_dict()) == names, "The merged model has other tensors than its base."
    plain.save_pretrained(f"{options.output}/merged")
    tokenizer.save_pretrained(f"{options.output}/merged")

    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(f"{options.output}/merged").eval()(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    same = (found.argmax(-1) == wanted.argmax(-1))[batch.attention_mask == 1].float().mean().item()
    assert same > 0.999, f"Only {same:.2%} of the next tokens are the same."
    return {"loss_before": losses[0], "loss_after": losses[-1], "same_next_token": same}


if __name__ == "__main__":
    print(json.dumps(main()))

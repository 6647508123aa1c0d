"""The first LoRA script most people see: Llama-2 in 8 bits, rank 8 on the query and value projections, and its counts.

Model  Llama-2-7B, or any other model with q_proj and v_proj
Time   that of loading the model; seconds with --tiny

What is written differently from the script as it goes round, and why:
- transformers 5 refuses `load_in_8bit=True` with a TypeError: it goes into a BitsAndBytesConfig. `torch_dtype=` is
  still read, with a warning: it is called `dtype=` now.
- The counts printed there (4,194,816 of 3,251,449,856) are not Llama-2-7B's. Rank 8 on a layer of 4096 × 4096 is 65,536
  numbers; two such layers in each of 32 blocks are 4,194,304, of 6,742,609,920 with the base: 0.06 %, one in 1,600.
- The last line there asks the config for its modules. A config has none: the trainable parameters are the adapter's.
"""

import argparse
import json
from typing import Any

import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from veneer import LoraConfig, get_peft_model

LLAMA_2_7B = {"trainable": 4_194_304, "total": 6_742_609_920}


def config() -> LoraConfig:
    """The config of the script."""
    return LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )


def counted(model: Any) -> dict[str, int]:
    """How many numbers are trained, and how many there are."""
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": sum(p.numel() for p in model.parameters()),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Load, adapt, count, and take one step. Returns the counts and losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-2-7b-hf")
    parser.add_argument("--output", default="adapters/llama2_8bit")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model = tiny_models.causal_lm()
    torch.manual_seed(0)

    # the counts of the 7B need no weights: the defaults of LlamaConfig are Llama-2-7B's
    with torch.device("meta"):
        shape_only = LlamaForCausalLM(LlamaConfig())
    claim = counted(get_peft_model(shape_only, config()))
    assert claim == LLAMA_2_7B, f"Llama-2-7B: {claim}"

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(
        options.model,
        device_map="auto",
        dtype=torch.float32 if options.tiny else torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )
    model = get_peft_model(base, config())
    counts = counted(model)
    share = counts["trainable"] / counts["total"]
    print(f"Trainable: {counts['trainable']:,} | Total: {counts['total']:,} | % trainable: {share:.2%}")

    batch = tokenizer("LoRA trains two thin matrices in each layer.", return_tensors="pt").to(model.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2 if options.tiny else 1e-3)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=batch.input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f}."
    model.save_pretrained(options.output)
    return {"llama_2_7b": claim, **counts, "loss_after": losses[-1]}


if __name__ == "__main__":
    print(json.dumps(main()))

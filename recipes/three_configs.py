"""Three configs for three occasions: plain LoRA, QLoRA on every linear layer, and LoRA with whole layers beside it.

Model  TinyLlama-1.1B-Chat, or any other causal language model with embeddings of its own at both ends
Data   one batch of the addresses that come with Veneer
Time   about a minute on a GPU; seconds with --tiny

plain          two projections of the attention: the smallest thing that works
qlora          the base in 4 bits (NF4, quantised twice), an adapter on every linear layer but the head.
               target_modules="all-linear" says so in Veneer and in PEFT; None says so in Veneer alone (in PEFT it looks
               the model up in a table: q_proj and v_proj for Llama, an error for a model it does not know)
saved_modules  four projections, and embeddings and head trained whole: for new words, at the price of a large file
"""

import argparse
import json
from typing import Any

import addresses
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from veneer import LoraConfig, get_peft_model, prepare_model_for_kbit_training

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def configs() -> dict[str, LoraConfig]:
    """The three, by name."""
    return {
        "plain": LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        "qlora": LoraConfig(
            r=64, lora_alpha=16, target_modules="all-linear", lora_dropout=0.1, bias="none", task_type="CAUSAL_LM"
        ),
        "saved_modules": LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=ATTENTION,
            modules_to_save=["embed_tokens", "lm_head"],
            task_type="CAUSAL_LM",
        ),
    }


def in_4_bits() -> BitsAndBytesConfig:
    """How QLoRA keeps the base."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train each for some steps. Returns what was counted and measured of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    parser.add_argument("--output", default="adapters/three_configs")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model = tiny_models.causal_lm()
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [f"{row['prompt']}\n{row['completion']}" for row in addresses.rows("train", 4)]
    found = {}
    for name, config in configs().items():
        quantised = {"quantization_config": in_4_bits()} if name == "qlora" else {}
        base = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto", **quantised)
        if quantised:
            base = prepare_model_for_kbit_training(base)
        model = get_peft_model(base, config)
        model.print_trainable_parameters()

        batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(6):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], f"{name}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}."
        model.save_pretrained(f"{options.output}/{name}")
        trained, total = model.get_nb_trainable_parameters()
        found[name] = {"trainable": trained, "total": total, "loss_before": losses[0], "loss_after": losses[-1]}
    return found


if __name__ == "__main__":
    print(json.dumps(main()))

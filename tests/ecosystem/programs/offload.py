"""A base of which accelerate keeps some layers on the CPU and some on disk: adapters train, save, load and merge."""

import json
import sys
import warnings
from pathlib import Path

import torch
from fixed_values import digest, fill
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tiny import llama

folder = Path(sys.argv[1])
ways = (False,) if sys.argv[2:] == ["in memory"] else (False, True)
warnings.simplefilter("ignore")
PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
llama().save_pretrained(folder / "base")
tokens = torch.arange(1, 25).reshape(2, 12)


def base(offloaded: bool):
    options = {"device_map": PLACES, "offload_folder": str(folder / "disk")} if offloaded else {}
    return AutoModelForCausalLM.from_pretrained(folder / "base", **options)


def logits(model) -> list[float]:
    with torch.no_grad():
        return [round(value, 4) for value in model.eval()(tokens).logits[:, -1, :4].flatten().tolist()]


def steps(model) -> list[float]:
    """The losses of three steps."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(round(loss.item(), 5))
    return found


found = {}
for dora in (False, True):
    kind = "DoRA" if dora else "LoRA"
    for offloaded in ways:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=dora, task_type="CAUSAL_LM")
        model = get_peft_model(base(offloaded), config)
        fill(model)
        made = {"logits": logits(model), "losses": steps(model), "digest": digest(model)}
        with model.disable_adapter():
            made["base"] = logits(model)
        made["trained"] = logits(model)
        where = folder / f"{kind}-{offloaded}"
        model.save_pretrained(where)
        made["loaded"] = logits(PeftModel.from_pretrained(base(offloaded), where))
        made["merged"] = logits(model.merge_and_unload())
        found[f"{kind} offloaded" if offloaded else kind] = made
found["device"] = [str(p.device) for p in base(True).model.layers[0].parameters()][:1]
print(json.dumps(found))

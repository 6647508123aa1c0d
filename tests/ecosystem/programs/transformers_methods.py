"""A transformers model's own methods for adapters, its loading from adapter folders, and pipelines."""

import json
import shutil
import sys
from pathlib import Path

import torch
from fixed_values import digest, fill, names, said
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)
from transformers.utils import logging

from train.tiny_chat import model as tiny_model
from train.tiny_chat import save_to

folder = Path(sys.argv[1])
logging.set_verbosity_error()
base = save_to(folder / "base")
X = torch.arange(3, 40).reshape(1, -1)


def config(**more) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **more})


def logits(model) -> list[float]:
    with torch.no_grad():
        return [round(float(value), 4) for value in model.eval()(X).logits[0, -1, :8]]


def model_with(name: str = "default", **more):
    made = AutoModelForCausalLM.from_pretrained(base)
    made.add_adapter(config(**more), adapter_name=name)
    fill(made, adapter_name=name)
    return made


found: dict[str, object] = {}
with said() as found["warnings"]:
    # add, switch, remove
    model = model_with("one")
    found["class"] = [type(model).__name__, model.__class__.__name__, isinstance(model, PeftModel)]
    found["trains"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["one"] = logits(model)
    model.add_adapter(config(r=2, target_modules=["down_proj"]), adapter_name="two")
    fill(model, seed=1, adapter_name="two")
    found["two"] = [model.active_adapters(), logits(model), sorted(model.peft_config)]
    model.set_adapter("one")
    found["one again"] = [model.active_adapters(), logits(model)]
    model.set_adapter(["one", "two"])
    found["both"] = [model.active_adapters(), logits(model)]
    model.disable_adapters()
    found["off"] = logits(model)
    model.enable_adapters()
    found["on"] = logits(model)
    model.set_adapter("two")
    state = model.get_adapter_state_dict()
    found["state"] = sorted(state)[:2] + [len(state)]
    for bad in (lambda: model.set_adapter("three"), lambda: model.add_adapter(config(), adapter_name="two")):
        try:
            bad()
        except ValueError as error:
            found.setdefault("refused", []).append(type(error).__mro__[-4].__name__)
    model.save_pretrained(folder / "two")
    found["files"] = names(folder / "two")
    model.delete_adapter("two")
    found["left"] = sorted(model.peft_config)

    # load
    model.set_adapter("one")
    model.save_pretrained(folder / "one")
    fresh = AutoModelForCausalLM.from_pretrained(base)
    fresh.load_adapter(str(folder / "one"))
    found["loaded"] = [logits(fresh), sum(p.requires_grad for p in fresh.parameters())]
    fresh.load_adapter(str(folder / "two"), adapter_name="two")
    found["loaded two"] = [fresh.active_adapters(), logits(fresh)]
    from_state = AutoModelForCausalLM.from_pretrained(base)
    from_state.load_adapter(
        peft_config=LoraConfig.from_pretrained(folder / "one"),
        adapter_state_dict=get_peft_model_state_dict(fresh, adapter_name="default"),
    )
    found["from state"] = logits(from_state)

    # hotswap
    other = model_with(task_type="CAUSAL_LM", lora_alpha=4)
    fill(other, seed=5)
    found["other"] = logits(other)
    other.save_pretrained(folder / "other")
    swapped = AutoModelForCausalLM.from_pretrained(base)
    swapped.enable_peft_hotswap(target_rank=8)
    swapped.load_adapter(str(folder / "one"), adapter_name="default")
    found["before swap"] = logits(swapped)
    swapped.load_adapter(str(folder / "other"), adapter_name="default", hotswap=True)
    found["swapped"] = logits(swapped)

    # from_pretrained of an adapter
    automatic = AutoModelForCausalLM.from_pretrained(folder / "one")
    found["auto"] = [type(automatic).__name__, logits(automatic), digest(automatic)]
    shutil.copytree(folder / "one", folder / "within" / "sub")
    inner = {"subfolder": "sub"}
    found["subfolder"] = logits(AutoModelForCausalLM.from_pretrained(folder / "within", adapter_kwargs=inner))
    shutil.copytree(base, folder / "both")
    for file in (folder / "one").glob("adapter*"):
        shutil.copy(file, folder / "both")
    found["beside the base"] = logits(AutoModelForCausalLM.from_pretrained(folder / "both"))
    found["mapped"] = logits(AutoModelForCausalLM.from_pretrained(folder / "one", device_map="cpu"))

    torch.manual_seed(0)
    judge = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=3,
        )
    ).eval()
    judge.save_pretrained(folder / "judge")
    wrapped = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(folder / "judge"),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"]),
    )
    fill(wrapped)
    with torch.no_grad():
        wrapped.get_parameter(
            next(name for name, p in wrapped.named_parameters() if "classifier" in name and p.requires_grad)
        ).add_(0.1)
    wrapped.save_pretrained(folder / "judged")
    again = AutoModelForSequenceClassification.from_pretrained(folder / "judged", num_labels=3)
    Y = torch.arange(3, 12).reshape(1, -1)
    with torch.no_grad():
        found["judged"] = torch.allclose(wrapped.eval()(Y).logits, again.eval()(Y).logits, atol=1e-6)

    # pipelines
    tokens = AutoTokenizer.from_pretrained(base)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    by_folder = pipeline("text-generation", model=str(folder / "other"), tokenizer=tokens, device="cpu")
    found["pipeline"] = by_folder("say red", **options)[0]["generated_text"]
    peft_model = PeftModel.from_pretrained(tiny_model(), folder / "other")
    by_model = pipeline("text-generation", model=peft_model, tokenizer=tokens, device="cpu")
    found["pipeline of a PeftModel"] = by_model("say red", **options)[0]["generated_text"]

print(json.dumps(found))

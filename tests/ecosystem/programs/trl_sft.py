"""SFTTrainer as TRL's documentation shows it, with `peft_config` and with a PeftModel."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from fixed_values import digest, fill, losses, names, said
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from train.tiny_chat import model as tiny_model
from train.tiny_chat import save_to, tokenizer

folder = Path(sys.argv[1])
disable_progress_bars()
logging.set_verbosity_error()
save_to(folder / "base")
# TRL wants to be told what the assistant says
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
tokens = tokenizer(MARKED)
SOME = {"embed_tokens": [4, 5, 80]}
WORDS = ["red", "green", "blue", "white", "black", "grey"]
chats = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": f"say {word}"},
                {"role": "assistant", "content": f"{word}, {word}!"},
            ]
        }
        for word in WORDS * 2
    ]
)
pairs = Dataset.from_list([{"prompt": f"say {word}", "completion": f" {word}, {word}!"} for word in WORDS * 2])
INPUT = torch.arange(3, 40).unsqueeze(0)


def tied():
    """The same model with one weight for embedding and output head."""
    own = tiny_model().config
    own.tie_word_embeddings = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(own).eval()


def config(**more) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **more)


def arguments(name: str, **more) -> SFTConfig:
    common = {
        "output_dir": str(folder / name),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    return SFTConfig(**{**common, **more})


def trainer(name: str, *, model=None, data=pairs, peft_config: LoraConfig | None = None, **more) -> SFTTrainer:
    """A trainer whose adapter has the same numbers on Veneer and on PEFT."""
    made = SFTTrainer(
        model=tiny_model() if model is None else model,
        args=arguments(name, **more),
        train_dataset=data,
        processing_class=tokens,
        peft_config=peft_config,
    )
    if peft_config is not None:
        fill(made.model)
    return made


def trained(*args, **kwargs) -> list[object]:
    made = trainer(*args, **kwargs)
    made.train()
    return [losses(made), digest(made.model)]


def agrees(model) -> bool:
    """Whether the loss that TRL takes from the head's weight is the model's own, and its gradients, too."""
    batch = {"input_ids": INPUT, "attention_mask": torch.ones_like(INPUT), "labels": INPUT}
    both = []
    for more in ({}, {"fused_lm_head": True}):
        model.zero_grad()
        loss = model(**batch, **more).loss
        loss.backward()
        both.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    return all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*both, strict=True))


found: dict[str, object] = {}
with said() as found["warnings"]:
    # As documented: a model's name, defaults (gradient checkpointing, chunked loss), checkpoints.
    saves = {"save_strategy": "steps", "save_steps": 2}
    first = trainer("plain", model=str(folder / "base"), peft_config=config(), **saves)
    found["facade"] = [type(first.model).__name__, isinstance(first.model, PeftModel)]
    found["trains"] = sum(p.numel() for p in first.model.parameters() if p.requires_grad)
    first.train()
    found["plain"] = [losses(first), digest(first.model)]
    found["files"] = names(folder / "plain" / "checkpoint-2")

    again = trainer("plain", model=str(folder / "base"), peft_config=config(), **saves)
    again.train(resume_from_checkpoint=str(folder / "plain" / "checkpoint-2"))
    found["resumed"] = [losses(again), digest(again.model) == digest(first.model)]

    first.save_model(str(folder / "saved"))
    found["saved"] = names(folder / "saved")
    first.model.eval()
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    reloaded = PeftModel.from_pretrained(base, folder / "saved").eval()
    with torch.no_grad():
        found["reloads"] = torch.allclose(reloaded(INPUT).logits, first.model(INPUT).logits, atol=1e-6)

    found["chats"] = trained("chats", data=chats, peft_config=config())
    found["assistant only"] = trained("assistant", data=chats, peft_config=config(), assistant_only_loss=True)
    found["packed"] = trained("packed", peft_config=config(), packing=True, max_length=64)
    found["whole loss"] = trained("nll", peft_config=config(), loss_type="nll", gradient_checkpointing=False)
    found["bf16"] = trained("bf16", peft_config=config(), bf16=True)
    found["reentrant"] = trained("re", peft_config=config(), gradient_checkpointing_kwargs={"use_reentrant": True})
    found["tokens"] = trained("tokens", peft_config=config(trainable_token_indices={"embed_tokens": [0, 5]}))
    try:
        found["tied"] = agrees(trainer("tied", model=tied(), peft_config=config(trainable_token_indices=SOME)).model)
    except AttributeError as error:
        found["tied"] = str(error)  # of PEFT, whose head has no bias then
    found["head"] = trained("head", peft_config=config(modules_to_save=["lm_head"]))
    try:
        trainer("lm_head", peft_config=LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    except ValueError as error:
        found["head adapted"] = str(error)

    mine = get_peft_model(tiny_model(), config())
    fill(mine)
    found["peft model"] = trained("mine", model=mine)

print(json.dumps(found))

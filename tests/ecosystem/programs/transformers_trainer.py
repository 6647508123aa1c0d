"""Trainer and Seq2SeqTrainer on a PeftModel, and on a model adapted in place."""

import json
import sys
from pathlib import Path

import torch
from fixed_values import digest, fill, losses, names, said
from peft import LoraConfig, get_peft_model
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from train.tiny_chat import model as tiny_model

folder = Path(sys.argv[1])
logging.set_verbosity_error()
generator = torch.Generator().manual_seed(0)
rows = [{"input_ids": (row := torch.randint(3, 200, (16,), generator=generator)), "labels": row} for _ in range(16)]


def config(**more) -> LoraConfig:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**fields, **more})


def facade(**more):
    made = get_peft_model(tiny_model(), config(**more))
    fill(made)
    return made


def in_place():
    made = tiny_model()
    made.add_adapter(config())
    fill(made)
    return made


def trainer(name: str, model=None, **more) -> Trainer:
    common = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    arguments = TrainingArguments(str(folder / name), **{**common, **more})
    return Trainer(facade() if model is None else model, arguments, train_dataset=rows, eval_dataset=rows[:4])


def trained(*args, **kwargs) -> list:
    made = trainer(*args, **kwargs)
    made.train()
    return [losses(made), digest(made.model)]


found: dict[str, object] = {}
with said() as found["warnings"]:
    for door, make in (("facade", facade), ("in place", in_place)):
        every = {"save_strategy": "steps", "save_steps": 2}
        whole = trainer(door, make(), **every)
        whole.train()
        found[door] = [losses(whole), digest(whole.model)]
        found[f"{door}: files"] = names(folder / door / "checkpoint-2")
        again = trainer(door, make(), **every)
        try:
            again.train(resume_from_checkpoint=str(folder / door / "checkpoint-2"))
            found[f"{door}: resumed"] = [losses(again), digest(again.model) == digest(whole.model)]
        except ValueError as error:
            found[f"{door}: resumed"] = str(error)

        best = {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "metric_for_best_model": "loss",
        }
        picked = trainer(f"{door} best", make(), **every, **best, eval_steps=2)  # other rows: the first is the best
        try:
            picked.train()
            scores = [round(entry["eval_loss"], 4) for entry in picked.state.log_history if "eval_loss" in entry]
            found[f"{door}: best"] = [scores, round(picked.evaluate()["eval_loss"], 4), digest(picked.model)]
        except (ValueError, OSError) as error:
            found[f"{door}: best"] = str(error)

    found["two"] = facade()
    found["two"].add_adapter("other", config(r=2))
    found["two"] = trained("two", found["two"], save_strategy="steps", save_steps=2)
    found["two: files"] = names(folder / "two" / "checkpoint-2")
    several = facade()
    several.add_adapter("other", config(r=2))
    again = trainer("two", several, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(folder / "two" / "checkpoint-2"))
    found["two: resumed"] = [losses(again), digest(again.model), several.active_adapter]

    recompute = {"gradient_checkpointing": True}
    found["recomputed"] = trained("re", **recompute, gradient_checkpointing_kwargs={"use_reentrant": False})
    found["reentrant"] = trained("rr", **recompute, gradient_checkpointing_kwargs={"use_reentrant": True})
    found["recomputed in place"] = trained("rp", in_place(), **recompute)
    found["smoothed"] = trained("smooth", label_smoothing_factor=0.1)
    found["smoothed in place"] = trained("smoothp", in_place(), label_smoothing_factor=0.1)
    found["accumulated"] = trained("acc", gradient_accumulation_steps=2)
    found["noisy"] = trained("noise", neftune_noise_alpha=5)
    found["dora"] = trained("dora", facade(use_dora=True, modules_to_save=["lm_head"]))

    torch.manual_seed(0)
    own = T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    translator = get_peft_model(
        T5ForConditionalGeneration(own), LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    )
    fill(translator)
    arguments = Seq2SeqTrainingArguments(
        str(folder / "t5"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
        generation_max_length=6,
        seed=0,
    )
    lines = [{"input_ids": row["input_ids"][:8] % 128, "labels": row["labels"][8:] % 128} for row in rows]
    translating = Seq2SeqTrainer(translator, arguments, train_dataset=lines, eval_dataset=lines[:4])
    translating.train()
    found["seq2seq"] = [losses(translating), digest(translator), names(folder / "t5" / "checkpoint-3")]
    found["seq2seq generates"] = translating.predict(lines[:4]).predictions.tolist()

print(json.dumps(found))

"""sentence-transformers: adapters on an embedding model and on a cross-encoder, trained, saved and loaded."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from fixed_values import digest, fill, losses, names, said
from peft import LoraConfig, TaskType
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.utils import logging

from train.tiny_chat import tokenizer

folder = Path(sys.argv[1])
disable_progress_bars()
logging.set_verbosity_error()
OWN = BertConfig(
    vocab_size=259,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=1,
)
torch.manual_seed(0)
BertModel(OWN).save_pretrained(folder / "bert")
tokenizer().save_pretrained(folder / "bert")
BertForSequenceClassification(OWN).save_pretrained(folder / "judge")
tokenizer().save_pretrained(folder / "judge")
WORDS = ["red", "green", "blue", "white", "black", "grey"]
COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_steps": 2,
    "seed": 0,
}
TEXTS = ["say red", "green, green!"]


def config(**more) -> LoraConfig:
    fields = {"r": 4, "lora_alpha": 8, "task_type": TaskType.FEATURE_EXTRACTION, "target_modules": ["query", "value"]}
    return LoraConfig(**{**fields, **more})


def vectors(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


def embedding(adapted: bool = True) -> SentenceTransformer:
    model = SentenceTransformer(str(folder / "bert"), device="cpu")
    if adapted:
        model.add_adapter(config())
        fill(model.transformers_model)
    return model


def embedding_trainer(model: SentenceTransformer) -> SentenceTransformerTrainer:
    pairs = Dataset.from_list([{"anchor": f"say {word}", "positive": f"{word}, {word}!"} for word in WORDS])
    arguments = SentenceTransformerTrainingArguments(str(folder / "run"), **COMMON)
    return SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))


found: dict[str, object] = {}
with said() as found["warnings"]:
    model = embedding()
    found["trains"] = [sum(p.numel() for p in model.parameters() if p.requires_grad), model.active_adapters()]
    before = vectors(model)
    trainer = embedding_trainer(model)
    trainer.train()
    found["embedding"] = [losses(trainer), digest(model.transformers_model)]
    found["checkpoint"] = names(folder / "run" / "checkpoint-2")
    found["changed"] = not torch.allclose(before, vectors(model))

    model.save_pretrained(str(folder / "saved"))
    found["saved"] = names(folder / "saved")
    again = SentenceTransformer(str(folder / "saved"), device="cpu")
    found["reloads"] = torch.allclose(vectors(model), vectors(again), atol=1e-6)
    loaded = embedding(adapted=False)
    loaded.load_adapter(str(folder / "saved"), adapter_name="mine")
    found["loads"] = [loaded.active_adapters(), torch.allclose(vectors(model), vectors(loaded), atol=1e-6)]
    model.disable_adapters()
    found["off"] = torch.allclose(vectors(model), vectors(embedding(adapted=False)), atol=1e-6)
    model.enable_adapters()
    found["state"] = len(model.get_adapter_state_dict())
    model.add_adapter(config(r=2), "second")
    model.set_adapter("default")
    model.delete_adapter("second")
    found["left"] = [
        list(model.transformers_model.peft_config),
        torch.allclose(vectors(model), vectors(again), atol=1e-6),
    ]

    on = embedding()
    trainer = embedding_trainer(on)
    try:
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
        found["resumed"] = [losses(trainer), digest(on.transformers_model)]
    except Exception as error:
        found["resumed"] = f"{type(error).__name__}: {error}"

    judge = CrossEncoder(str(folder / "judge"), device="cpu")
    judge.add_adapter(config(task_type=TaskType.SEQ_CLS, modules_to_save=["classifier"]))
    fill(judge.transformers_model)
    pairs = Dataset.from_list(
        [{"query": f"say {word}", "answer": f"{word}!", "label": float(at % 2)} for at, word in enumerate(WORDS)]
    )
    arguments = CrossEncoderTrainingArguments(str(folder / "crossed"), **COMMON)
    trainer = CrossEncoderTrainer(judge, arguments, train_dataset=pairs)
    trainer.train()
    found["judge"] = [losses(trainer), digest(judge.transformers_model)]
    judge.save_pretrained(str(folder / "judged"))
    found["judge saved"] = names(folder / "judged")
    again = CrossEncoder(str(folder / "judged"), device="cpu")
    rows = [("say red", "red!"), ("say blue", "red!")]
    one, other = judge.predict(rows), again.predict(rows)
    found["judge reloads"] = bool(abs(one - other).max() < 1e-6)

print(json.dumps(found))

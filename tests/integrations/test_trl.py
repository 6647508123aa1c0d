"""TRL's own trainers on models with adapters, in place and behind a PeftModel, without any alias."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import tiny
import veneer
from train.tiny_chat import model as chat_model
from train.tiny_chat import tokenizer
from veneer.errors import AttachError

# TRL reads transformers' older name of checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

QUIET = {
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "activation_checkpointing": True,  # TRL's default, under its newer name
}
TEXTS = Dataset.from_dict({"prompt": ["a", "bc", "d", "e"] * 2, "completion": [" one", " two", " three", " four"] * 2})
PAIRS = Dataset.from_dict({"prompt": ["a", "bc"] * 4, "chosen": [" yes", " aye"] * 4, "rejected": [" no", " nay"] * 4})


def config(**options: Any) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, **options})


def in_place(**options: Any) -> Any:
    model = chat_model()
    veneer.add_adapter(model, config(**options), generator=torch.Generator().manual_seed(1))
    return model


def facade(**options: Any) -> Any:
    return veneer.get_peft_model(chat_model(), config(**options), generator=torch.Generator().manual_seed(1))


DOORS = [pytest.param(in_place, id="in place"), pytest.param(facade, id="facade")]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def sft(model: Any, folder: Path, **options: Any) -> SFTTrainer:
    args = SFTConfig(output_dir=str(folder), **{**QUIET, **options})
    return SFTTrainer(model=model, args=args, train_dataset=TEXTS, processing_class=tokenizer())


def dpo(model: Any, folder: Path, ref_model: Any = None, **options: Any) -> DPOTrainer:
    args = DPOConfig(output_dir=str(folder), **{**QUIET, **options})
    return DPOTrainer(model=model, ref_model=ref_model, args=args, train_dataset=PAIRS, processing_class=tokenizer())


@pytest.mark.parametrize("make", DOORS)
class TestSupervised:
    def test_a_run_goes_on_as_if_it_had_not_stopped(self, make, tmp_path):
        whole = make()
        before = trained(whole)
        sft(whole, tmp_path).train()
        names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert "model.safetensors" not in names
        again = make()
        sft(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        after = trained(whole)
        assert all(torch.equal(value, trained(again)[name]) for name, value in after.items())
        assert not any(torch.equal(value, before[name]) for name, value in after.items())

    def test_a_head_trained_in_full(self, make, tmp_path):
        model = make(modules_to_save=["lm_head"], lora_dropout=0)
        tiny.shake(model)
        made = sft(model, tmp_path, save_strategy="no", max_steps=1, activation_checkpointing=False)
        batch = next(iter(made.get_train_dataloader()))
        loss = made.compute_loss(made.model, dict(batch))
        torch.testing.assert_close(loss, model(**batch).loss)
        loss.backward()
        gradients = [p.grad for name, p in model.named_parameters() if "lm_head.modules_to_save" in name]
        assert gradients
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)

    def test_an_adapter_on_the_head_is_refused(self, make, tmp_path):
        made = sft(make(target_modules=["lm_head"]), tmp_path)
        with pytest.raises(AttachError, match=r"TRL multiplies by lm_head\.weight itself"):
            made.train()


class TestPreferences:
    @pytest.mark.parametrize("make", DOORS)
    def test_with_a_reference(self, make, tmp_path):
        model = make(init_lora_weights=False)
        before = trained(model)
        made = dpo(model, tmp_path, chat_model())
        made.train()
        assert not any(torch.equal(value, before[name]) for name, value in trained(model).items())
        assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()

    def test_behind_a_facade_the_adapter_s_start_is_the_reference(self, tmp_path):
        start = facade(init_lora_weights=False, lora_dropout=0)
        other = facade(init_lora_weights=False, lora_dropout=0)
        frozen = facade(init_lora_weights=False, lora_dropout=0)
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)
        own, explicit = dpo(start, tmp_path / "a"), dpo(other, tmp_path / "b", frozen.get_base_model())
        own.train()
        explicit.train()
        assert list(start.peft_config) == ["default", "ref"]
        assert start.active_adapters == ["default"]
        losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (own, explicit)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        for one, two in zip(trained(start).values(), trained(other).values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", [True, False])
def test_rewards(place, tmp_path):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    settings = chat_model().config
    settings.num_labels = 1
    base = LlamaForSequenceClassification(settings)
    wanted = config(task_type="SEQ_CLS", modules_to_save=["score"])
    if place:
        veneer.add_adapter(base, wanted)
    model = base if place else veneer.get_peft_model(base, wanted)
    before = trained(model)
    args = RewardConfig(output_dir=str(tmp_path), **QUIET)
    RewardTrainer(model=model, args=args, train_dataset=PAIRS, processing_class=tokenizer()).train()
    assert not any(torch.equal(value, before[name]) for name, value in trained(model).items())
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()

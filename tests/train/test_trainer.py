"""The loss: equal to transformers' own in every way of computing it."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM
from trl.trainer.sft_trainer import SFTTrainer

from train.tiny_chat import model, tokenizer
from veneer import LoraConfig
from veneer.errors import RunError
from veneer.integrations.transformers import add_adapter
from veneer.train.build import arguments
from veneer.train.data import Message, Row
from veneer.train.loss import plain_head, summed_loss
from veneer.train.order import ByLength
from veneer.train.settings import RunConfig
from veneer.train.tokens import tokenise
from veneer.train.trainer import VeneerSFTTrainer
from veneer.train.watch import Meter


def examples():
    rows = [
        Row((Message("user", question), Message("assistant", reply)), f"line {at}", plain=True)
        for at, (question, reply) in enumerate([("hi", "hello"), ("a longer question", "no"), ("why", "who knows")])
    ]
    return tokenise(rows, tokenizer(), stops=[2], max_length=200).examples


def trainer(tmp_path: Path, adapted, *, in_head: bool = True, **training) -> VeneerSFTTrainer:
    settings = RunConfig.model_validate(
        {"model": "m", "data": {"train": "x"}, "output": str(tmp_path), "training": {"batch_size": 3, **training}}
    )
    columns = {"input_ids": [e.input_ids for e in examples()], "labels": [e.labels for e in examples()]}
    made = VeneerSFTTrainer(
        model=adapted,
        args=arguments(settings, tmp_path, evaluates=False),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        meter=Meter(),
        schedule="linear",
        warmup=0,
        group_by_length=settings.training.group_by_length and not settings.training.packing,
    )
    made.head = plain_head(adapted) if in_head else None
    assert in_head == (made.head is not None)
    return made


def adapted(**config):
    bare = model()
    add_adapter(bare, LoraConfig(r=4, init_lora_weights=False, **config), generator=torch.Generator().manual_seed(0))
    return bare


def reference(bare) -> torch.Tensor:
    """Cross-entropy per learned token, row by row, by transformers' own loss."""
    total, count = 0.0, 0
    for example in examples():
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        learned = int((labels[:, 1:] != -100).sum())
        total += bare(input_ids=ids, labels=labels).loss * learned
        count += learned
    return total / count


def loss_of(made: VeneerSFTTrainer) -> torch.Tensor:
    return made.compute_loss(made.model, next(iter(made.get_train_dataloader())))


@pytest.mark.parametrize("in_head", [True, False])
def test_the_loss_is_transformers_own(tmp_path: Path, in_head: bool) -> None:
    bare = adapted()
    torch.testing.assert_close(loss_of(trainer(tmp_path, copy.deepcopy(bare), in_head=in_head)), reference(bare))


@pytest.mark.parametrize("in_head", [True, False])
def test_packed_rows_do_not_see_each_other(tmp_path: Path, in_head: bool) -> None:
    bare = adapted()
    packed = trainer(tmp_path, copy.deepcopy(bare), in_head=in_head, packing=True, max_length=256, batch_size=1)
    assert len(packed.train_dataset) == 1
    torch.testing.assert_close(loss_of(packed), reference(bare))


@pytest.mark.parametrize("in_head", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_evaluation_loss_is_that_of_all_rows_at_once(tmp_path: Path, in_head: bool, batch_size: int) -> None:
    bare = adapted()
    made = trainer(tmp_path, copy.deepcopy(bare), in_head=in_head, batch_size=batch_size)
    found = made.evaluate(made.train_dataset)
    assert found["eval_loss"] == pytest.approx(reference(bare).item(), rel=1e-5)


def test_an_adapted_output_head_is_trained(tmp_path: Path) -> None:
    bare = adapted(target_modules=["lm_head"])
    loss = loss_of(trainer(tmp_path, bare, in_head=False))
    torch.testing.assert_close(loss, reference(bare))
    loss.backward()
    gradients = [p.grad for name, p in bare.named_parameters() if "lora_" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    large = trainer(tmp_path / "a", adapted(), max_steps=1, epochs=None, warmup=0)
    small = trainer(
        tmp_path / "b", adapted(), max_steps=1, epochs=None, batch_size=1, gradient_accumulation=3,
        warmup=0,
    )  # fmt: skip
    for made in (large, small):
        made.train()
    for one, other in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_nothing_is_sent_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.base_trainer as base

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("telemetry")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", fail)
    trainer(tmp_path, adapted())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_training_before_the_weights_change(tmp_path: Path, what: str) -> None:
    made = trainer(tmp_path, adapted())
    parameter = next(p for name, p in made.model.named_parameters() if "lora_B" in name)
    if what == "loss":
        made.model.model.norm.weight.data[0] = float("nan")
    else:
        parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = parameter.detach().clone()
    with pytest.raises(RunError, match=f"{what} is not a finite number at step 1"):
        made.train()
    assert torch.equal(parameter, before)


def test_a_mixture_of_experts_adds_its_term_for_an_even_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, router_aux_loss_coef=0.5, pad_token_id=0,
    )  # fmt: skip
    bare = MixtralForCausalLM(config)
    lora = LoraConfig(r=4, init_lora_weights=False, exclude_modules=["experts"])
    add_adapter(bare, lora, generator=torch.Generator().manual_seed(0))
    made = trainer(tmp_path, bare)
    inputs = next(iter(made.get_train_dataloader()))
    made.model.train()
    theirs = SFTTrainer.compute_loss(made, made.model, dict(inputs))
    torch.testing.assert_close(made.compute_loss(made.model, dict(inputs)), theirs)
    made.model.eval()
    learned = (inputs["labels"][:, 1:] != -100).sum()
    found = made.compute_loss(made.model, dict(inputs))
    assert found < theirs
    torch.testing.assert_close(found, summed_loss(made.model, without(inputs), inputs["labels"], None)[0] / learned)


def without(inputs):
    return {name: value for name, value in inputs.items() if name != "labels"}


@pytest.mark.parametrize("group_by_length", [True, False])
def test_rows_of_a_step_are_of_similar_length_where_that_is_asked_for(tmp_path: Path, group_by_length: bool) -> None:
    made = trainer(tmp_path, adapted(), batch_size=1, group_by_length=group_by_length)
    assert isinstance(made._get_train_sampler(), ByLength) == group_by_length
    batches = [batch["input_ids"].shape[1] for batch in made.get_eval_dataloader(made.train_dataset)]
    assert (batches == sorted(batches, reverse=True)) == group_by_length
    assert sorted(batches) == sorted(len(example.input_ids) for example in examples())

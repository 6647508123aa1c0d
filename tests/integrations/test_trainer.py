"""transformers' own Trainer, as it is, on models with adapters: in place, and behind a PeftModel."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LabelSmoother

import tiny
import veneer
from veneer.errors import AdapterFileError, AttachError, MergeError

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


class Rows(Dataset):
    """Token ids with labels, and a column that no model takes."""

    def __init__(self, rows: int = 24, tokens: int = 6) -> None:
        self.ids = tiny.ids(rows=rows, tokens=tokens)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"input_ids": self.ids[at], "labels": self.ids[at]}


def config(**options: Any) -> veneer.LoraConfig:
    return veneer.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.1, **options}
    )


def in_place(base: Any = None, **options: Any) -> Any:
    model = base or tiny.llama()
    veneer.add_adapter(model, config(**options), generator=torch.Generator().manual_seed(1))
    return model


def facade(base: Any = None, **options: Any) -> Any:
    return veneer.get_peft_model(base or tiny.llama(), config(**options), generator=torch.Generator().manual_seed(1))


DOORS = [pytest.param(in_place, id="in place"), pytest.param(facade, id="facade")]


def trainer(model: Any, folder: Path, *, rows: Any = None, compute_metrics: Any = None, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 6,
            "save_steps": 3,
            "save_strategy": "steps",
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows or Rows(),
        eval_dataset=Rows(6),
        compute_metrics=compute_metrics,
    )


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def bases(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() != set()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", DOORS)
class TestCheckpoints:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({}, id="lora"),
            pytest.param(
                {"use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}, id="more"
            ),
            pytest.param({"init_lora_weights": "pissa"}, id="pissa"),
        ],
    )
    def test_a_run_goes_on_as_if_it_had_not_stopped(self, make, options, tmp_path):
        whole = make(**options)
        base = bases(whole)
        first = trainer(whole, tmp_path)
        first.train()
        assert_equal(bases(whole), base)
        checkpoint = tmp_path / "checkpoint-3"
        files = {path.name for path in checkpoint.iterdir()}
        assert files >= ADAPTER
        assert not files & {"model.safetensors", "config.json", "pytorch_model.bin"}
        again = make(**options)
        second = trainer(again, tmp_path)
        second.train(resume_from_checkpoint=str(checkpoint))
        assert_equal(trained(again), trained(whole))
        assert losses(second)[-3:] == losses(first)[-3:]

    def test_the_newest_one(self, make, tmp_path):
        trainer(make(), tmp_path, save_total_limit=1).train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
        made = trainer(make(), tmp_path, max_steps=8)
        made.train(resume_from_checkpoint=True)
        assert [entry["step"] for entry in made.state.log_history if "loss" in entry] == list(range(1, 9))

    def test_the_best_one_at_the_end(self, make, tmp_path):
        model = make()
        made = trainer(
            model,
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            learning_rate=0.5,
            metric_for_best_model="eval_loss",
        )
        made.train()
        scores = {e["step"]: e["eval_loss"] for e in made.state.log_history if "eval_loss" in e}
        best = min(scores, key=scores.__getitem__)
        assert best < 6
        assert made.evaluate()["eval_loss"] == pytest.approx(scores[best], abs=1e-6)
        file = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
        values = veneer.get_peft_model_state_dict(model)
        assert all(
            torch.equal(value, file["base_model.model." + key.removeprefix("base_model.model.")])
            for key, value in values.items()
        )

    def test_the_model_alone(self, make, tmp_path):
        model = make()
        made = trainer(model, tmp_path, save_only_model=True)
        made.train()
        assert {path.name for path in (tmp_path / "checkpoint-6").iterdir()} >= ADAPTER
        made.save_model(str(tmp_path / "end"))
        assert {path.name for path in (tmp_path / "end").iterdir()} == {*ADAPTER, "README.md", "training_args.bin"}
        loaded = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path / "end")
        model.eval()
        assert torch.equal(loaded(tiny.ids()).logits, model(tiny.ids()).logits)

    def test_a_checkpoint_of_other_settings_is_refused(self, make, tmp_path):
        trainer(make(), tmp_path).train()
        other = make(r=2)
        before = trained(other)
        with pytest.raises(AdapterFileError, match="cannot go on from .*checkpoint-6") as caught:
            trainer(other, tmp_path).train(resume_from_checkpoint=True)
        assert "r: 2 on the model, 4 in" in str(caught.value)
        assert "hotswap" not in str(caught.value)
        assert_equal(trained(other), before)

    def test_a_folder_without_a_checkpoint_is_refused_as_ever(self, make, tmp_path):
        with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
            trainer(make(), tmp_path).train(resume_from_checkpoint=str(tmp_path))


class TestSeveralAdapters:
    def test_behind_a_facade_each_goes_on(self, tmp_path):
        def make():
            model = facade()
            for at, name in enumerate(("b", "ref")):
                model.add_adapter(name, config(r=2), generator=torch.Generator().manual_seed(7 + at))
            tiny.shake(model)
            model.set_adapter(["default", "b"])
            return model

        whole = make()
        trainer(whole, tmp_path).train()
        folder = tmp_path / "checkpoint-3"
        assert {path.parent.name for path in folder.rglob("adapter_config.json")} == {"checkpoint-3", "b", "ref"}
        again = make()
        trainer(again, tmp_path).train(resume_from_checkpoint=str(folder))
        assert again.active_adapters == ["default", "b"]
        assert_equal(trained(again), trained(whole))
        assert len(trained(again)) == 16

    def test_none_of_them_called_default(self, tmp_path):
        def make():
            return veneer.get_peft_model(tiny.llama(), config(), "mine", generator=torch.Generator().manual_seed(1))

        whole = make()
        options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
        trainer(whole, tmp_path, **options).train()
        assert (tmp_path / "checkpoint-3" / "mine" / "adapter_model.safetensors").exists()
        again = make()
        trainer(again, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert_equal(trained(again), trained(whole))

    def test_one_that_trains_and_is_not_in_the_checkpoint(self, tmp_path):
        trainer(facade(), tmp_path).train()
        model = facade()
        model.add_adapter("b", config())
        model.set_adapter(["default", "b"])
        with pytest.raises(AdapterFileError, match="no values for adapter 'b'"):
            trainer(model, tmp_path).train(resume_from_checkpoint=True)

    def test_in_place_the_active_one_goes_on(self, tmp_path):
        def make():
            model = in_place()
            veneer.add_adapter(model, config(r=2), "b", generator=torch.Generator().manual_seed(7))
            return model

        whole = make()
        trainer(whole, tmp_path).train()
        again = make()
        trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert again.active_adapters() == ["b"]
        assert_equal(trained(again), trained(whole))


class Biased(Rows):
    """Rows for BERT's classifier."""

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"input_ids": self.ids[at], "labels": int(self.ids[at][0]) % 3}


@pytest.mark.parametrize("make", DOORS)
def test_biases_and_a_head_go_on(make, tmp_path):
    options = {"target_modules": ["query", "value"], "bias": "all", "task_type": "SEQ_CLS"}
    whole = make(tiny.bert(), **options)
    made = trainer(whole, tmp_path, rows=Biased())
    made.train()
    again = make(tiny.bert(), **options)
    trainer(again, tmp_path, rows=Biased()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(trained(again), trained(whole))


@pytest.mark.parametrize("make", DOORS)
class TestTheLoss:
    def test_every_column_arrives(self, make, tmp_path):
        from datasets import Dataset as Table

        ids = tiny.ids(rows=4).tolist()
        table = Table.from_dict({"input_ids": ids, "labels": ids, "text": ["a"] * 4})
        model = make()
        made = trainer(model, tmp_path, rows=table, max_steps=1, save_strategy="no", per_device_train_batch_size=4)
        batch = next(iter(made.get_train_dataloader()))
        assert set(batch) == {"input_ids", "labels"}
        made.train()

    def test_smoothed_labels_are_shifted(self, make, tmp_path):
        model = make(lora_dropout=0)
        made = trainer(model, tmp_path, label_smoothing_factor=0.2, save_strategy="no")
        batch = {"input_ids": tiny.ids(), "labels": tiny.ids()}
        loss = made.compute_loss(model, dict(batch))
        bare = tiny.llama()
        wanted = LabelSmoother(0.2)({"logits": bare(tiny.ids()).logits}, tiny.ids(), shift_labels=True)
        torch.testing.assert_close(loss, wanted)

    def test_accumulated_batches_are_one_large_batch(self, make, tmp_path):
        found = []
        for batch, accumulate in ((4, 1), (1, 4)):
            model = make(lora_dropout=0)
            made = trainer(
                model,
                tmp_path / str(batch),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                max_steps=3,
                save_strategy="no",
            )
            made.train()
            found.append((losses(made), trained(model)))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
        for one, other in zip(found[0][1].values(), found[1][1].values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_changes_nothing(self, make, reentrant, tmp_path):
        found = []
        for checkpointing in (False, True):
            model = make(lora_dropout=0)
            made = trainer(
                model,
                tmp_path / str(checkpointing),
                activation_checkpointing=checkpointing,
                activation_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
                max_steps=3,
                save_strategy="no",
            )
            made.train()
            found.append(trained(model))
        for one, other in zip(found[0].values(), found[1].values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", DOORS)
class TestWhatElseItDoes:
    def test_it_scores_and_predicts(self, make, tmp_path):
        def score(found: Any) -> dict[str, float]:
            return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

        model = make()
        made = trainer(model, tmp_path, compute_metrics=score, save_strategy="no")
        made.train()
        assert {"eval_loss", "eval_right"} <= set(made.evaluate())
        found = made.predict(Rows(5))
        assert found.predictions.shape == (5, 6, 64)
        assert found.metrics is not None
        assert "test_right" in found.metrics

    def test_noise_on_the_embedding_ends_with_the_run(self, make, tmp_path):
        model = make(lora_dropout=0)
        before = model(tiny.ids()).logits
        made = trainer(model, tmp_path, neftune_noise_alpha=50, save_strategy="no", learning_rate=0.0)
        quiet = trainer(make(lora_dropout=0), tmp_path, save_strategy="no", learning_rate=0.0)
        made.train()
        quiet.train()
        assert losses(made) != losses(quiet)
        model.eval()
        assert torch.equal(model(tiny.ids()).logits, before)

    def test_rows_of_one_length_together(self, make, tmp_path):
        made = trainer(make(), tmp_path, train_sampling_strategy="group_by_length", save_strategy="no")
        made.train()
        assert made.state.global_step == 6

    def test_it_writes_a_card(self, make, tmp_path):
        made = trainer(make(), tmp_path, max_steps=1)
        made.train()
        made.create_model_card(model_name="tiny")
        assert "tiny" in (tmp_path / "README.md").read_text()


def test_injected_adapters_are_saved_and_go_on(tmp_path):
    def make():
        torch.manual_seed(1)
        return veneer.inject_adapter_in_model(config(), tiny.llama())

    whole = make()
    trainer(whole, tmp_path).train()
    assert {path.name for path in (tmp_path / "checkpoint-3").iterdir()} >= ADAPTER
    again = make()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(trained(again), trained(whole))
    again.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Nothing here can be trained")
@pytest.mark.parametrize("make", DOORS)
def test_it_says_why_nothing_can_be_trained(make, tmp_path):
    made = make()
    made.save_pretrained(tmp_path / "saved")
    if make is facade:
        frozen = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    else:
        frozen = tiny.llama()
        veneer.load_adapter(frozen, tmp_path / "saved")
    with pytest.raises(AttachError, match=r"adapter 'default' is frozen.* is_trainable=True"):
        trainer(frozen, tmp_path).train()
    veneer.LoraModel(made if make is in_place else made.get_base_model()).merge_adapter()
    with pytest.raises(MergeError, match=r"'default' is merged: call unmerge_adapter\(\)"):
        trainer(made, tmp_path).train()


def test_other_models_are_saved_and_resumed_as_ever(tmp_path):
    set_seed(0)
    whole = tiny.llama()
    made = trainer(whole, tmp_path)
    made.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    again = tiny.llama()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(trained(again), trained(whole))


def test_it_is_told_once():
    import transformers.trainer as module

    facade()
    first = (module.Trainer._load_from_checkpoint, module._is_peft_model, module.PeftModel)
    facade()
    in_place()
    assert (module.Trainer._load_from_checkpoint, module._is_peft_model, module.PeftModel) == first

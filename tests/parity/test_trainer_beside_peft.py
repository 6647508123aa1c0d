"""The real PEFT in one process with ours: Trainer does with its models what it did."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import tiny
import veneer

# PEFT reads transformers' older name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")


class Rows(torch.utils.data.Dataset):
    ids = tiny.ids(rows=16)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, at):
        return {"input_ids": self.ids[at], "labels": self.ids[at]}


def trainer(model, folder, steps=4):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows())


def made(library):
    torch.manual_seed(1)
    return library.get_peft_model(tiny.llama(), library.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def trained(model):
    return {
        name.replace(".adapters.default.lora_A", ".lora_A.default.weight").replace(
            ".adapters.default.lora_B", ".lora_B.default.weight"
        ): p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def test_its_models_go_on_as_ever(tmp_path):
    made(veneer)  # Trainer is told
    whole = made(peft)
    trainer(whole, tmp_path).train()
    again = made(peft)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, trained(again)[name]) for name, value in trained(whole).items())


def test_a_run_of_either_goes_on_in_the_other(tmp_path):
    theirs, ours = made(peft), made(veneer)
    with torch.no_grad():
        values = trained(theirs)
        for name, parameter in zip(trained(ours), (p for p in ours.parameters() if p.requires_grad), strict=True):
            parameter.copy_(values[name])
    first, second = trainer(theirs, tmp_path / "theirs"), trainer(ours, tmp_path / "ours")
    first.train()
    second.train()
    for one, other in ((theirs, "ours"), (ours, "theirs")):
        library = peft if one is theirs else veneer
        again = made(library)
        trainer(again, tmp_path / other).train(resume_from_checkpoint=str(tmp_path / other / "checkpoint-2"))
        for name, value in trained(one).items():
            torch.testing.assert_close(trained(again)[name], value, rtol=1e-4, atol=1e-6)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

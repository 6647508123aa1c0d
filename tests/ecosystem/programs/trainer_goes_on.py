"""Train, stop, go on: with transformers' Trainer imported after the adapter is there, by one process or several.

Arguments: a folder, and "place" or "facade". Prints what there is to compare.
"""

import json
import sys
from pathlib import Path

import torch

import tiny
import veneer
from veneer.distributed.gloo import wait_for_gloo

FOLDER, DOOR = Path(sys.argv[1]), sys.argv[2]


def model():
    base, config = tiny.llama(), veneer.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    generator = torch.Generator().manual_seed(1)
    if DOOR == "place":
        veneer.add_adapter(base, config, generator=generator)
        return base
    return veneer.get_peft_model(base, config, generator=generator)


whole = model()
early = "transformers.trainer" in sys.modules
from transformers import Trainer, TrainingArguments  # noqa: E402  the point of this program


class Rows(torch.utils.data.Dataset):
    ids = tiny.ids(rows=32)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, at):
        return {"input_ids": self.ids[at], "labels": self.ids[at], "unused": 1}


def trainer(model):
    arguments = TrainingArguments(
        output_dir=str(FOLDER),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows())


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


before = trained(whole)
first = trainer(whole)
first.train()
again = model()
trainer(again).train(resume_from_checkpoint=str(FOLDER / "checkpoint-3"))
found = {
    "early": early,
    "processes": first.args.world_size,
    "files": sorted(path.name for path in (FOLDER / "checkpoint-3").iterdir()),
    "equal": all(torch.equal(value, trained(again)[name]) for name, value in trained(whole).items()),
    "moved": not any(torch.equal(value, before[name]) for name, value in trained(whole).items()),
}
if first.is_world_process_zero():
    print(json.dumps(found))
wait_for_gloo()

"""What a program sees of its own process under the alias, and what the processes see that it spawns."""

import importlib
import importlib.metadata
import io
import json
import multiprocessing
import pickle
import sys

import fixed_values  # lies beside the program
import peft
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader


class Rows:
    """A data set whose rows tell which PEFT the worker has."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, at: int) -> str:
        return peft.__veneer__


def child(rank: int) -> list[object]:
    """What a spawned process sees."""
    return [__name__, peft.__veneer__, LoraConfig(r=rank).r, fixed_values.__name__]


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        spawned = pool.map(child, [3])[0]
    workers = next(iter(DataLoader(Rows(), batch_size=2, num_workers=1, multiprocessing_context="spawn")))

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    again = torch.load(written, weights_only=False)
    x = torch.ones(1, 4)
    reloaded = importlib.reload(peft)
    forgotten = [sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "peft"]
    found_again = [importlib.import_module(name).__name__ for name in ("peft", "peft.tuners.lora")]
    files = [str(vars(module).get("__file__")) for module in list(sys.modules.values())]
    found = {
        "arguments": sys.argv[1:],
        "document": __doc__,
        "file": __file__ == sys.argv[0] == sys.modules["__main__"].__file__,
        "main": sys.modules["__main__"].child is child,
        "pickled": [pickle.loads(pickle.dumps(LoraConfig(r=3))) == LoraConfig(r=3), torch.equal(model(x), again(x))],
        "version": importlib.metadata.version("peft"),
        "real": sum("site-packages/peft/" in file for file in files),
        "reloaded": [reloaded is peft, peft.LoraConfig is LoraConfig, peft.__veneer__],
        "found again": [*found_again, sys.modules["peft"] is peft, len(forgotten) > 2],
        "spawned": spawned,
        "workers": workers,
    }
    print(json.dumps(found))

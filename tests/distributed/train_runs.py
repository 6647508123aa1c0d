"""Run by torchrun: runs of several processes against runs of one. Each rank prints one line of JSON.

torchrun --nproc-per-node 2 train_runs.py FOLDER     the runs of one process lie there already
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from train.tiny_run import Told, settings
from veneer.errors import DataError, RunError
from veneer.train import run
from veneer.train.ranks import FailedElsewhere, join


def main(folder: Path) -> None:
    rank, found = int(os.environ["RANK"]), {}
    model, rows = folder / "model", folder / "rows.jsonl"
    common = {"batch_size": 2, "epochs": 2, "max_steps": None, "save_every": 2, "data": {"eval_fraction": 0.3}}

    told = Told()
    result = run.train(settings(model, rows, folder / "grouped-2", eval_every=2, **common), progress=told)
    found |= {"eval": result.eval_losses, "tokens": result.tokens, "said": len(told.lines), "steps": told.steps}
    run.train(settings(model, rows, folder / "shuffled-2", group_by_length=False, lora={"use_dora": True}, **common))

    # stopped after three steps of six, with a checkpoint after two; then on to the end
    begun = {**common, "max_steps": 3, "epochs": None, "schedule": "constant"}
    run.train(settings(model, rows, folder / "resumed", **begun))
    run.train(settings(model, rows, folder / "resumed", **{**begun, "max_steps": 6, "resume": True}))

    # what is wrong here alone, or everywhere, ends all before anything is touched
    found["alone"] = _refused(folder, settings(model, folder / f"rows-{rank}.jsonl", folder / "bad"))
    found["everywhere"] = _refused(folder, settings(model, folder / "nowhere.jsonl", folder / "bad"))
    found["in use"] = _refused(folder, settings(model, rows, folder / "grouped-2"))
    found["other rows a step"] = _refused(
        folder, settings(model, rows, folder / "resumed", **{**begun, "batch_size": 4, "max_steps": 6, "resume": True})
    )
    found["other data"] = _refused(folder, settings(model, folder / f"good-{rank}.jsonl", folder / "bad"))
    found["bad exists"] = (folder / "bad").exists()
    for at in range(join().count):
        if at == rank:
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
        dist.barrier()


def _refused(folder: Path, config) -> list[str]:
    try:
        run.train(config)
    except (RunError, DataError) as error:
        return ["elsewhere" if isinstance(error, FailedElsewhere) else type(error).__name__, str(error)]
    return ["nothing", ""]


if __name__ == "__main__":
    from veneer.distributed.gloo import wait_for_gloo

    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
    wait_for_gloo()

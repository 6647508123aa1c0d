"""Run every recipe of a folder in this one process, tiny, and print what each returned and the adapters it wrote.

recipes_run.py FOLDER OUTPUT [NAME…]
"""

import hashlib
import importlib
import json
import sys
import time
from pathlib import Path

import transformers
from safetensors.numpy import load_file


def written(folder: Path) -> dict[str, dict]:
    """The adapters below a folder: their config, the shape of each tensor, and one digest of all values."""
    found = {}
    for config in sorted(folder.rglob("adapter_config.json")):
        tensors = load_file(config.parent / "adapter_model.safetensors")
        digest = hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()
        found[str(config.parent.relative_to(folder))] = {
            "config": json.loads(config.read_text(encoding="utf-8")),
            "shapes": {name: list(tensors[name].shape) for name in sorted(tensors)},
            "digest": digest,
        }
    return found


def main(folder: str, output: str, *names: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    sys.path.insert(0, folder)
    report = {}
    for name in names:
        place = Path(output) / name
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        returned = importlib.import_module(name).main(["--tiny", "--output", str(place)])
        print(f"== {name}: {time.perf_counter() - start:.1f} s", flush=True)
        report[name] = {"returned": returned, "written": written(place)}
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Memory of LoRA over a base in float32, bfloat16, 8 and 4 bits: each part counted, beside what arithmetic says.

python -m benchmarks.quantised_memory
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.activation_memory import saved_bytes
from benchmarks.harness import Figure, Options, Row, Table, main
from benchmarks.peak import ALLOCATOR, HOME
from benchmarks.record import RESULTS
from veneer.train.estimate import SMOLLM2_135M, Keeping, Run, memory

ABOUT = """Bytes that a training step of LoRA holds, part by part, over SmolLM2-135M kept in four ways, a process each.
Weights, adapters, gradients and optimizer are counted tensor by tensor, activations by saved-tensor hooks, each storage
once. The arithmetic is that of `veneer.train.estimate`. Resident is what the process grew by until its first step was
done, libraries among it, and the most that it grew by in a second step: the allocator, and what no tensor says."""
PAGE = HOME / "docs" / "quantised.md"
BEGIN, END = "<!-- table: written from benchmarks/results/quantised_memory.json -->", "<!-- table: end -->"
MIB = 2**20
KEPT: tuple[Keeping, ...] = ("float32", "bfloat16", "int8", "nf4")
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations")
TINY = replace(SMOLLM2_135M, name="tiny", width=64, mlp=128, layers=2, heads=2, kv_heads=1, vocabulary=512)
COLUMNS = ("base", *PARTS, "sum", "resident: before", "resident: step")


def run_of(keeping: Keeping, *, quick: bool = False) -> Run:
    """What is measured."""
    computes = 2 if keeping == "bfloat16" else 4
    shape = TINY if quick else SMOLLM2_135M
    return Run(shape, keeping, rows=2 if quick else 4, tokens=16 if quick else 256, computes=computes, on_cpu=True)


def tensors_of(model: nn.Module) -> Iterator[tuple[bool, Tensor]]:
    """(whether it is trained, tensor) of all that a model holds, scales of rounded weights among them."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            yield parameter.requires_grad, parameter.data
            for scale in _scales(module, parameter):
                yield False, scale


def _scales(module: nn.Module, weight: Any) -> Iterator[Tensor]:
    state = getattr(weight, "quant_state", None)
    for one in (state, getattr(state, "state2", None)):
        yield from (value for value in vars(one or object).values() if isinstance(value, Tensor))
    largest = getattr(weight, "SCB", None)
    if largest is None:
        largest = getattr(getattr(module, "state", None), "SCB", None)
    if largest is not None:
        yield largest


def counted(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def step_parts(keeping: Keeping, *, quick: bool) -> dict[str, int]:
    """Bytes of each part in this process: a step of AdamW on one batch, its loss as in `veneer train`."""
    from veneer import LoraConfig, add_adapter, prepare_model_for_kbit_training
    from veneer.train.loss import plain_head, summed_loss

    run, begun = run_of(keeping, quick=quick), _resident("VmRSS")
    model = loaded(run, quick=quick)
    if keeping in ("int8", "nf4"):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    add_adapter(model, LoraConfig(r=run.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    head = plain_head(model)
    ids_BT = torch.randint(0, run.shape.vocabulary, (run.rows, run.tokens), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def forward() -> Tensor:
        return summed_loss(model, {"input_ids": ids_BT}, ids_BT, head)[0]

    def step() -> None:
        forward().backward()
        optimizer.step()

    step()
    tensors = list(tensors_of(model))
    states = [value for each in optimizer.state.values() for value in each.values() if value.ndim]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    held = _resident("VmRSS")
    found = {
        "weights": counted(tensor for trains, tensor in tensors if not trains),
        "adapters": counted(tensor for trains, tensor in tensors if trains),
        "gradients": counted(iter(gradients)),
        "optimizer": counted(iter(states)),
        "activations": saved_bytes(model, forward),
        "resident: before": held - begun,
    }
    optimizer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    step()
    return {**found, "resident: step": _resident("VmHWM") - before}


def loaded(run: Run, *, quick: bool) -> Any:
    """The model of a run, its weights kept as the run says."""
    from veneer.train.load import load_model
    from veneer.train.small_model import small_model

    dtype: Any = run.keeping if run.keeping in ("float32", "bfloat16") else "auto"
    quantization: Any = run.keeping if dtype == "auto" else None
    if not quick:
        return load_model(str(small_model()), dtype=dtype, quantization=quantization)
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**run.shape.llama_config)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        return load_model(folder, dtype=dtype, quantization=quantization)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(keeping: Keeping, *, quick: bool) -> dict[str, int]:
    """`step_parts` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quantised_memory", "--parts", json.dumps([keeping, quick])]
    done = subprocess.run(command, cwd=HOME, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def figure(options: Options) -> Figure:
    """A table for each way to keep the base."""
    tables = []
    for keeping in KEPT[2:] if options.quick else KEPT:
        run, found = run_of(keeping, quick=options.quick), measured(keeping, quick=options.quick)
        said = memory(run)
        rows = [Row(part, [found[part] / MIB]) for part in found]
        rows += [Row(f"{part}, by arithmetic", [said[part] / MIB]) for part in PARTS]
        setting = {"rows": run.rows, "tokens": run.tokens, "rank": run.rank, "model": run.shape.name}
        tables.append(Table(f"A base in {keeping}", rows, None, "MiB", setting, plot=False))
    return Figure("quantised_memory", "Memory over a quantised base", ABOUT, tables)


def matrix(made: Figure) -> str:
    """All of it as one Markdown table, for docs/quantised.md: measured, and below it by arithmetic."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for table in made.tables:
        rows = {row.name: row.median for row in table.rows}
        counts, sums = [rows[part] for part in PARTS], [rows[f"{part}, by arithmetic"] for part in PARTS]
        beside = [rows[name] for name in COLUMNS[-2:]]
        cells = [f"{value:.1f}" for value in (*counts, sum(counts), *beside)]
        lines.append(f"| {table.title.removeprefix('A base in ')} | {' | '.join(cells)} |")
        lines.append(f"| by arithmetic | {' | '.join(f'{value:.1f}' for value in (*sums, sum(sums)))} | | |")
    return "\n".join(lines) + "\n"


def with_table(page: str, results: Path = RESULTS) -> str:
    """docs/quantised.md with the table of what is recorded."""
    made = Figure.load(results / "quantised_memory.json")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{matrix(made)}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--parts"]:
        which, short = json.loads(sys.argv[2])
        print(json.dumps(step_parts(which, quick=short)))
    else:
        main(figure, __doc__)
        if (RESULTS / "quantised_memory.json").exists():
            PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

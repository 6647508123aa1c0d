"""Figure 1: the training step of two SmolLM2-shaped layers, against the limit: the same layers frozen.

python -m benchmarks.step
python -m benchmarks.step --device cuda
"""

import torch
from torch import nn

from benchmarks.adapted import SMOLLM2_LAYERS, TINY, Work, adapted, forward_only, sharing, step
from benchmarks.harness import Aim, Contender, Figure, Options, Table, main, measure
from veneer.train import freed_memory

ABOUT = """Forward and backward of a model with an adapter on the seven projections of every layer. The *limit* is the
same model frozen, with a gradient for its input only: less than that no adapter can cost. The products of the adapters
themselves, 6·T·P_adapter floating-point operations against 4·T·P_base, are about 1.05 × the limit at rank 16."""
AIMS = {("LoRA", 0.0): 1.10, ("rsLoRA", 0.0): 1.10, ("LoRA", 0.05): 1.15, ("rsLoRA", 0.05): 1.15}
AIMS |= {("DoRA", 0.0): 1.15, ("DoRA", 0.05): 1.25}
LIMIT = "limit"


def contender(library: str, method: str, dropout: float) -> str:
    """What a row is called."""
    return f"{library} {method}" + (f", dropout {dropout:g}" if dropout else "")


def steps(
    base: nn.Module,
    work: Work,
    *,
    rank: int = 16,
    methods: tuple[str, ...] = ("LoRA", "DoRA"),
    dropouts: tuple[float, ...] = (0.0, 0.05),
    full: bool = True,
) -> dict[str, Contender]:
    """The contenders of one table: the limit, what frames it, and both libraries."""
    made = {LIMIT: step(base, work)}
    if full:
        made["forward only"] = forward_only(base, work)
        made["full fine-tuning"] = step(sharing(base).requires_grad_(True), work)
    for method in methods:
        for dropout in dropouts:
            for library in ("PEFT", "Veneer"):
                model = adapted(library, sharing(base), rank=rank, dropout=dropout, method=method)
                made[contender(library, method, dropout)] = step(model, work)
    return made


def aims(names: dict[str, Contender]) -> dict[str, Aim]:
    """The aims of those of these contenders that have one."""
    known = {contender("Veneer", *key): Aim(at_most=bound) for key, bound in AIMS.items()}
    return {name: aim for name, aim in known.items() if name in names}


def step_table(
    title: str, work: Work, options: Options, *, rank: int = 16, rounds: int, warmup: int = 2, **which
) -> Table:
    """One table of training steps over one base.

    Freed memory stays with the process, for all contenders alike: how much of it the system takes back, and clears
    again, depends on what ran before (see freed_memory.py).
    """
    contenders = steps(work.base(), work, rank=rank, **which)
    with freed_memory.kept():
        return measure(
            title,
            contenders,
            options,
            reference=LIMIT,
            rounds=rounds,
            warmup=warmup,
            aims=aims(contenders),
            setting={**work.setting, "rank": rank},
        )


def bfloat16_is_fast(device: str) -> bool:
    """Whether the device multiplies bf16 itself; where it does not, a step takes some forty times as long."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()


def figure(options: Options) -> Figure:
    """LoRA, rsLoRA and DoRA with and without dropout at rank 16; LoRA and DoRA at ranks 8 and 64; a bf16 base."""
    shape, batch, tokens = (TINY, 2, 16) if options.quick else (SMOLLM2_LAYERS, 4, 256)
    if options.device.startswith("cuda"):
        batch *= 8
    work = Work(shape, batch, tokens, device=options.device)
    every = ("LoRA", "rsLoRA", "DoRA")
    tables = [step_table("Training step, rank 16", work, options, rounds=15, methods=every)]
    for rank in (8, 64):
        tables.append(step_table(f"Training step, rank {rank}", work, options, rank=rank, rounds=9, full=False))
    about = ABOUT
    if bfloat16_is_fast(options.device):
        half = Work(shape, batch, tokens, torch.bfloat16, options.device)
        tables.append(step_table("Training step, bf16 base, fp32 adapters, rank 16", half, options, rounds=9))
    else:
        about += " This processor has no bf16 products, so bf16 was not measured."
    return Figure("step", "Training step", about, tables)


if __name__ == "__main__":
    main(figure, __doc__)

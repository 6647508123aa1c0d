"""Figure 1, large layers: the training step of two Llama-7B-shaped layers, against the limit.

python -m benchmarks.step_large                 # few tokens and few rounds: about three minutes on two cores, 6 GB
python -m benchmarks.step_large --device cuda   # bf16, 4,096 tokens
"""

import torch

from benchmarks.adapted import LLAMA_7B_LAYERS, TINY, Work
from benchmarks.harness import Figure, Options, main
from benchmarks.step import bfloat16_is_fast, step_table

ABOUT = """Two layers of hidden size 4096 and MLP size 11008. On a CPU with few tokens, which favours nobody but weighs
what depends on the weights alone (DoRA's norms) more than a training run would."""


def figure(options: Options) -> Figure:
    """LoRA and DoRA at rank 16, over a bf16 base where the device multiplies bf16, else fp32."""
    shape, batch, tokens = (TINY, 2, 16) if options.quick else (LLAMA_7B_LAYERS, 1, 128)
    if options.device.startswith("cuda"):
        batch, tokens = 2, 2048
    bases = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if bfloat16_is_fast(options.device) else {})
    tables = []
    for name, dtype in bases.items():
        work = Work(shape, batch, tokens, dtype, options.device)
        title = f"Llama-7B's layers, {name} base, fp32 adapters, rank 16"
        tables.append(step_table(title, work, options, rounds=3, warmup=1))
    return Figure("step_large", "Training step of large layers", ABOUT, tables)


if __name__ == "__main__":
    main(figure, __doc__)

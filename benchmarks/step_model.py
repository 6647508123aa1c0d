"""Figure 1, a whole model: the training step of SmolLM2-135M with its head and loss, against the limit.

python -m benchmarks.step_model             # about three minutes on two cores
python -m benchmarks.step_model --rounds 9  # nine
"""

from benchmarks.adapted import SMOLLM2, TINY, Work
from benchmarks.harness import Figure, Options, main
from benchmarks.step import step_table

ABOUT = """The same on all thirty layers of SmolLM2-135M, with its head over 49,152 words and transformers' own loss on
every token. The weights are random. The limit computes the head's input gradient too, so the adapters' share is
smaller."""


def figure(options: Options) -> Figure:
    """LoRA and DoRA at rank 16, fp32."""
    shape, batch, tokens = (TINY, 2, 16) if options.quick else (SMOLLM2, 4, 128)
    if options.device.startswith("cuda"):
        batch, tokens = 8, 1024
    work = Work(shape, batch, tokens, device=options.device)
    table = step_table("Training step of SmolLM2-135M, rank 16", work, options, rounds=4, warmup=1)
    return Figure("step_model", "Training step of a whole model", ABOUT, [table])


if __name__ == "__main__":
    main(figure, __doc__)

"""What it costs that freed memory goes back to the system between steps, and what keeping it saves. On a CPU.

python -m benchmarks.freed_memory
"""

import resource
from contextlib import ExitStack
from typing import Any

from benchmarks.adapted import SMOLLM2, TINY, Work, adapted, step
from benchmarks.harness import Contender, Figure, Options, Row, Table, main, measure
from veneer.train import freed_memory

ABOUT = """The training step of SmolLM2-135M with LoRA of rank 16 on all its projections, with memory as the C library
manages it, and as `veneer train` has it on a CPU: what a step frees stays with the process for the next (glibc only).
A page fault is a page of 4 KiB that the system had to find and clear. What is computed is the same. With
batches of changing length a process came to hold 15 % more memory at most (1,146 MiB instead of 997), and no more with
time. In a loop of one's own: `with veneer.train.freed_memory.kept():`."""
AS_IT_COMES, KEPT = "as it comes", "Veneer, freed memory kept"


class Contest:
    """One model's step, within and without; page faults are counted beside the time."""

    def __init__(self, work: Work) -> None:
        self.step = step(adapted("Veneer", work.base()), work)
        self.within = ExitStack()
        self.faults: dict[str, list[float]] = {AS_IT_COMES: [], KEPT: []}

    def contender(self, name: str) -> Contender:
        """After a step that is not timed, since it is the first after what was there before."""

        def prepare() -> Any:
            self.within.close()
            if name == KEPT:
                self.within.enter_context(freed_memory.kept())
            assert self.step.prepare is not None
            self.step.run(self.step.prepare())
            return self.step.prepare()

        def run(x: Any) -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            self.step.run(x)
            self.faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

        return Contender(run, prepare)


def tables(title: str, work: Work, options: Options, rounds: int) -> list[Table]:
    """Seconds, and page faults."""
    contest = Contest(work)
    contenders = {name: contest.contender(name) for name in contest.faults}
    times = measure(
        title, contenders, options, reference=AS_IT_COMES, rounds=rounds, warmup=1, setting={**work.setting, "rank": 16}
    )
    contest.within.close()
    count = len(times.rows[0].values)
    rows = [Row(name, found[-count:]) for name, found in contest.faults.items()]
    return [times, Table(f"Page faults: {title}", rows, None, "pages", times.setting, plot=False)]


def figure(options: Options) -> Figure:
    """A step of SmolLM2."""
    shape, batch, tokens = (TINY, 2, 16) if options.quick else (SMOLLM2, 4, 128)
    made = tables(f"A step of {batch} × {tokens} tokens", Work(shape, batch, tokens), options, rounds=5)
    return Figure("freed_memory", "Freed memory", ABOUT, made)


if __name__ == "__main__":
    main(figure, __doc__)

"""The learning rate of each step, as a share of training.learning_rate.

share   1 |   ____                 linear, cosine: down to almost 0 at the last step
          |  /    ''--..           constant: stays
        0 +-/-----------''--
            warmup        total    the first step already has 1 / warmup, never 0
"""

from math import cos, pi
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["linear", "cosine", "constant"]


def scheduler(optimizer: "Optimizer", schedule: Schedule, *, warmup: float, steps: int) -> "LambdaLR":
    """The scheduler of a run of so many steps; `warmup` as in run.yaml, a share below 1 or a number of steps."""
    from torch.optim.lr_scheduler import LambdaLR

    first = warmup_steps(warmup, steps)
    # a function of its own: of any other callable LambdaLR would save the state, group by group, and want it again
    return LambdaLR(optimizer, lambda step: share(step, schedule=schedule, warmup=first, steps=steps))


def warmup_steps(warmup: float, steps: int) -> int:
    """Whole steps of warmup.

    >>> warmup_steps(0.03, 20), warmup_steps(0.03, 1000), warmup_steps(5, 20)
    (0, 30, 5)
    """
    return int(warmup * steps) if warmup < 1 else int(warmup)


def share(step: int, *, schedule: Schedule, warmup: int, steps: int) -> float:
    """The share of the learning rate at a step, counted from 0. Above 0 in each step of the run.

    >>> [share(n, schedule="linear", warmup=2, steps=6) for n in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2, "constant": 1.0}[schedule]

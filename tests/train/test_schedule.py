import pytest
import torch
from transformers import get_scheduler

from veneer.train.schedule import Schedule, scheduler, share, warmup_steps


def test_a_share_of_few_steps_is_no_warmup() -> None:
    assert [warmup_steps(0.03, steps) for steps in (1, 33, 34, 100)] == [0, 0, 1, 3]
    assert warmup_steps(7, 10) == 7


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0.03, 1), (0.5, 7), (3, 7), (9, 7)])
def test_no_step_has_a_learning_rate_of_0(schedule: Schedule, warmup: float, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    made = scheduler(optimizer, schedule, warmup=warmup, steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    assert all(0 < rate <= 2 for rate in rates)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_without_warmup_it_is_transformers_own(schedule: Schedule) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=9)
    for step in range(9):
        assert share(step, schedule=schedule, warmup=0, steps=9) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()

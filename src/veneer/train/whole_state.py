"""The state of an optimizer that DeepSpeed runs, whole.

DeepSpeed lays all that is trained end to end, cuts that into pieces, one a process, and steps the pieces. A checkpoint
of its own fits as many processes as wrote it, and holds pickled copies of the base. Ours has the state of each
parameter, as `optimizer.pt` has it without DeepSpeed: what ZeRO 2 began, ZeRO 3, DDP or one process can go on with.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import RunError
from veneer.train.zero import stage


class WholeState:
    """The state of an optimizer in pieces, as that of one that steps each parameter by itself.

    zero    DeepSpeed's optimizer, around the one that steps the pieces
    groups  those of that one before: empty ones are no more, and `by_dtype` has made several of one

    All processes must call `gather`, the first of them `state_dict`, and all `load_state_dict`.
    """

    def __init__(self, zero: Any, groups: Sequence[dict[str, Any]]) -> None:
        self.zero, self.groups = zero, groups
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self._gathered: dict[str, Any] = {}

    def gather(self) -> None:
        """Make the state whole, in main memory."""
        from deepspeed.utils import safe_get_full_optimizer_state  # type: ignore

        read: Any = safe_get_full_optimizer_state
        by_place: dict[int, dict[str, Any]] = {}
        numbers, lasting = _kinds_of_state(self.zero.optimizer.state)
        for place, parameter in enumerate(self.parameters):
            found = {key: read(parameter, key).to("cpu", copy=True) for key in lasting}
            by_place[place] = {key: value.clone() for key, value in numbers.items()} | found
        self._gathered = {"state": by_place if lasting else {}, "param_groups": [*self._param_groups()]}

    def state_dict(self) -> dict[str, Any]:
        """What was gathered, in the form of `torch.optim.Optimizer.state_dict`."""
        return self._gathered

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the pieces such a state. Raises RunError if it is that of other parameters."""
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != [len(group["params"]) for group in self.groups]:
            raise RunError("The checkpoint's optimizer has other parameters than this run. Start anew, overwrite=true.")
        givens = (given for given, parts in zip(state["param_groups"], self._parts, strict=True) for _ in range(parts))
        for group, given in zip(self.zero.optimizer.param_groups, givens, strict=True):
            group.update({key: value for key, value in given.items() if key != "params"})
        if not state["state"]:
            return
        numbers, lasting = _kinds_of_state(state["state"])
        inner = self.zero.optimizer
        for piece in self._pieces():
            inner.state[piece] = {key: value.clone() for key, value in numbers.items()}
            inner.state[piece] |= {key: torch.zeros_like(piece) for key in lasting}
        if stage() < 3:
            self.zero._lazy_init_hp_params_optimizer_state()  # says where each parameter is in the state of a piece
        for place, parameter in enumerate(self.parameters):
            for key in lasting:
                _give(parameter, state["state"][place][key], key)

    def _param_groups(self) -> Iterator[dict[str, Any]]:
        first, now = 0, iter(self.zero.optimizer.param_groups)
        for before, parts in zip(self.groups, self._parts, strict=True):
            group = {"initial_lr": before["lr"], **([next(now) for _ in range(parts)] or [before])[0]}
            yield {**group, "params": [*range(first, first + len(before["params"]))]}
            first += len(before["params"])

    @property
    def _parts(self) -> list[int]:
        """How many groups DeepSpeed has of each."""
        return [len(_dtypes(group["params"])) for group in self.groups]

    def _pieces(self) -> list[Tensor]:
        """What this process steps."""
        if stage() == 3:
            return self.zero.fp32_partitioned_groups_flat
        return [piece for group in self.zero.optimizer.param_groups for piece in group["params"]]


def by_dtype(optimizer: torch.optim.Optimizer) -> None:
    """Let each group of an optimizer have parameters of one dtype: DeepSpeed lays them end to end."""
    groups = optimizer.param_groups
    optimizer.param_groups = [
        {**group, "params": [parameter for parameter in group["params"] if parameter.dtype is dtype]}
        for group in groups
        for dtype in _dtypes(group["params"])
    ]


def _dtypes(parameters: Sequence[nn.Parameter]) -> list[torch.dtype]:
    """Their dtypes, each once."""
    return [*dict.fromkeys(parameter.dtype for parameter in parameters)]


def _kinds_of_state(state: Any) -> tuple[dict[str, Any], list[str]]:
    """What an optimizer keeps alike for all (how many steps), and the names of what it keeps for each number."""
    kept = next(iter(state.values()), {})
    lasting = [key for key, value in kept.items() if isinstance(value, Tensor) and value.dim()]
    return {key: torch.as_tensor(value).cpu() for key, value in kept.items() if key not in lasting}, lasting


def _give(parameter: Any, value: Tensor, key: str) -> None:
    """Give this process's piece of a parameter's state its part of the whole value."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state  # type: ignore

    if stage() < 3:
        safe_set_full_optimizer_state(parameter, value, key)
        return
    each = parameter.ds_tensor.numel()  # the last pieces are filled up with zeros
    piece = torch.zeros(each, dtype=value.dtype)
    first = each * parameter.ds_zero_partition_rank
    mine = value.flatten()[first : first + each]
    piece[: len(mine)] = mine
    safe_set_local_optimizer_state(parameter, piece, key)


@contextmanager
def as_without(trainer: Any, optimizer: Any) -> Iterator[None]:
    """Within the block Trainer reads and writes the state of this optimizer, as it does without DeepSpeed."""
    kept = trainer.optimizer, trainer.is_deepspeed_enabled
    trainer.optimizer, trainer.is_deepspeed_enabled = optimizer, False
    try:
        yield
    finally:
        trainer.optimizer, trainer.is_deepspeed_enabled = kept

"""A part of a batch, which one adapter serves: its rows, and which of their tokens.

Shapes: N rows of a batch, T tokens; `...` any further dimensions.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from veneer.errors import AttachError

_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a batch that an adapter serves.

    batch   N, how many rows the batch has
    rows    which of them, as indices; None for all
    tokens  (N, T), True where the adapter acts; None for all tokens
    lasting  whether the layers see it again and again within one call, token after token
    """

    batch: int
    rows: Tensor | None = None
    tokens: Tensor | None = None
    lasting: bool = False
    _indices: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    _shared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def through(self, update: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """y with `update(x, y)` in place of this part of it.

        A layer may see each row several times in a run: its tokens one below the other, or its beams.
        Raises AttachError if the layer's input is no such batch.
        """
        if self.rows is not None:
            return y.index_copy(0, *self.changed(update, x, y))
        times = self.check(x)
        new = update(x, y)
        return new if self.tokens is None else torch.where(self._mask(y, times), new, y)

    def changed(self, update: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(indices in y, `update(x, y)` there) of the rows, for a part that names some."""
        times = self.check(x)
        rows = self._index(x.device, times)
        old = y.index_select(0, rows)
        new = update(x.index_select(0, rows), old)
        if self.tokens is None:
            return rows, new
        return rows, torch.where(self._mask(y, times).index_select(0, rows), new, old)

    def check(self, x: Tensor) -> int:
        """How many times a layer's input has each row. Raises AttachError if it is no such batch."""
        times, rest = divmod(x.shape[0], self.batch)
        if rest or not times:
            raise AttachError(
                f"A layer got {x.shape[0]} rows where the batch has {self.batch}: which adapter serves which of them "
                "cannot be told. Choose one adapter for the whole batch with set_adapter."
            )
        return times

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The rows as numbers."""
        return tuple(range(self.batch) if self.rows is None else self.rows.tolist())

    def shared(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What `make` gives, made once for all layers that ask by this key; until `forget`."""
        if torch.compiler.is_compiling():  # compiled code has what was made as constants
            return make()
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def forget(self) -> None:
        """Let go of all that was made for layers."""
        self._indices.clear()
        self._shared.clear()

    def on_all_tokens(self) -> "Part":
        """The same rows, from their first token to their last."""
        return Part(self.batch, self.rows)

    def _index(self, device: torch.device, times: int) -> Tensor:
        """The rows of a layer's input, each `times` times; made once for all layers of a device."""
        assert self.rows is not None
        found = self._indices.get((device, times))
        if found is None:
            rows = self.rows.to(device)
            found = (rows.unsqueeze(1) * times + torch.arange(times, device=device)).reshape(-1)
            self._indices[device, times] = found
        return found

    def _mask(self, y: Tensor, times: int) -> Tensor:
        """Where y is to be changed. A layer that sees fewer tokens than the batch has, sees its last (a head, say)."""
        assert self.tokens is not None
        tokens = self.tokens.to(y.device)
        T = tokens.shape[1]
        if y.dim() == 2 and times % T == 0:
            return tokens.repeat_interleave(times // T, 0).reshape(-1, 1)
        if y.dim() < 3 or y.shape[1] > T:
            raise AttachError(
                f"A layer's output has the shape {list(y.shape)} where rows have {T} tokens: on which of them the "
                "adapter acts cannot be told. Leave the layer out of target_modules."
            )
        mask = tokens[:, T - y.shape[1] :].repeat_interleave(times, 0)
        return mask.reshape(*mask.shape, *[1] * (y.dim() - 2))


@dataclass(frozen=True, eq=False)
class Awaited(Part):
    """The part of an activated adapter (aLoRA) while no tokens have been seen, and so outside the model's forward."""

    def check(self, x: Tensor) -> int:
        """Raise AttachError: where the adapter acts is known within a forward pass of the whole model only."""
        raise AttachError(
            "An adapter with alora_invocation_tokens acts from those tokens on, and only the forward of the model it "
            "was attached to sees them: call that, not a part of the model."
        )


def parts_of(names: Sequence[str | None], *, lasting: bool = False) -> dict[str, Part]:
    """The rows of each adapter, given the name for each row of a batch; None for a row that gets no adapter.

    lasting  whether the layers see the batch again and again within one call
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows.setdefault(name, []).append(row)
    parts = {name: Part(len(names), torch.tensor(mine), lasting=lasting) for name, mine in rows.items()}
    for name, part in parts.items():
        vars(part)["numbers"] = tuple(rows[name])  # so that nobody has to read the tensor, which compiled code cannot
    return parts

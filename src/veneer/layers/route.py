"""Which adapters act, and on which part of a batch. One `Route` is shared by all layers of a model and is all they
look at.

Shapes: N rows of a batch.
"""

import reprlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterNameError
from veneer.layers.part import Awaited, Part

BASE = "__base__"  # where rows name their adapters: none


def as_names(names: str | Iterable[str]) -> list[str]:
    """One name or several, as a list. Raises AdapterNameError if they are no names."""
    found = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    strange = [name for name in found if not isinstance(name, str)]
    if strange:
        raise AdapterNameError(f"The name of an adapter is a text, not {reprlib.repr(strange[0])}.")
    return found


@dataclass(frozen=True, eq=False)
class Step:
    """One adapter's turn in a forward pass, for the whole batch or a part of it."""

    name: str
    part: Part | None = None


@dataclass(frozen=True)
class Prompt:
    """The tokens that a call begins with, and where invoked adapters start to act in them.

    starts      {adapter: (N,) index of the first token it acts on}
    tokens      T
    generating  whether the call is generate, which runs forward again and again with what follows these tokens
    """

    starts: Mapping[str, Tensor]
    tokens: int
    generating: bool


@dataclass
class _Block:
    """What one thread's layers read within `Route.following`."""

    acting: tuple[str, ...]
    plan: tuple[Step, ...]
    thread: int | None


class Route:
    """The adapters that act in the next forward pass, in order.

    active   the adapters that were chosen
    enabled  False while adapters are disabled
    merged   the adapters that are part of the weights just now, and so must not be added again
    standing the adapters whose biases or weights stand in the place of the base's just now
    invoked  the adapters that act from certain tokens on; the model's forward says where that is
    prompt   within a call of generate, or one with alora_offsets: where they start to act

    What a layer needs to know of the whole model, since other libraries tell each layer what to do:

    asked      the names that were chosen, some of which may be of adapters of another model (a pipeline has several)
    trainable  {adapter: whether it may get gradients}, of all adapters on the model
    replacing  the adapters that have biases or weights to stand in the place of the base's, now or at other times
    may_train  the adapters whose parameters may require gradients: those attached, or let train, since the choice
    merged_on  {adapter: the number of layers that have it in their weights by themselves}
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self._acting: tuple[str, ...] = ()
        self._plan: tuple[Step, ...] = ()
        self._block: _Block | None = None
        self._one_block = threading.RLock()
        self.standing: tuple[str, ...] = ()
        self.invoked: frozenset[str] = frozenset()
        self.prompt: Prompt | None = None
        self.asked: tuple[str, ...] = ()
        self.trainable: dict[str, bool] = {}
        self.replacing: frozenset[str] = frozenset()
        self.may_train: set[str] = set()
        self.merged_on: dict[str, int] = {}

    @property
    def acting(self) -> tuple[str, ...]:
        """The adapters whose effect the output has: as chosen, or as the block of this thread says."""
        block = self._block_here()
        return self._acting if block is None else block.acting

    @property
    def plan(self) -> tuple[Step, ...]:
        """Those of them that layers must add, each with its part of the batch."""
        block = self._block_here()
        return self._plan if block is None else block.plan

    @plan.setter
    def plan(self, plan: tuple[Step, ...]) -> None:
        block = self._block_here()
        if block is None:
            self._plan = plan
        else:
            block.plan = plan

    def _block_here(self) -> _Block | None:
        """The block that this thread is in. Compiled code has one thread, whose number it could not ask for."""
        block = self._block
        if block is None or torch.compiler.is_compiling() or block.thread in (None, threading.get_ident()):
            return block
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_block", "_one_block")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _block=None, _one_block=threading.RLock())

    @property
    def in_weights(self) -> tuple[str, ...]:
        """The adapters that are part of weights just now: of all layers', or of some layers' by themselves."""
        return tuple(dict.fromkeys((*self.merged, *self.merged_on)))

    def count_merged(self, names: Sequence[str], more: int) -> None:
        """Note that one more layer has these adapters in its weights by itself, or one less (`more` of -1)."""
        for name in names:
            self.merged_on[name] = self.merged_on.get(name, 0) + more
            if not self.merged_on[name]:
                del self.merged_on[name]

    def set(
        self,
        *,
        active: tuple[str, ...] | None = None,
        asked: tuple[str, ...] | None = None,
        enabled: bool | None = None,
        merged: tuple[str, ...] | None = None,
        invoked: frozenset[str] | None = None,
    ) -> None:
        """Change what is chosen, enabled, merged or invoked; what layers read follows.

        asked  what was asked for, if that is more than `active`
        """
        self.invoked = self.invoked if invoked is None else invoked
        if active is not None:
            self.active, self.asked = active, active if asked is None else asked
        self.enabled = self.enabled if enabled is None else enabled
        self.merged = self.merged if merged is None else merged
        self._acting = (self.merged or self.active) if self.enabled else ()
        self._plan = () if self.merged else tuple(map(self.step, self._acting))

    def step(self, name: str, part: Part | None = None) -> Step:
        """An adapter's turn, on its part of the batch; on which tokens of it an invoked adapter acts is awaited."""
        if name not in self.invoked:
            return Step(name, part)
        return Step(name, Awaited(0) if part is None else Awaited(part.batch, part.rows))

    @contextmanager
    def following(self, acting: tuple[str, ...], plan: tuple[Step, ...]) -> Iterator[None]:
        """Within the block, layers called by this thread read these, whatever is chosen outside or meanwhile.

        Another thread's block waits until this one ends; its calls outside a block read what is chosen.
        """
        compiling = torch.compiler.is_compiling()
        alone: AbstractContextManager[Any] = nullcontext() if compiling else self._one_block
        with alone:
            outer = self._block
            self._block = _Block(acting, plan, None if compiling else threading.get_ident())
            try:
                yield
            finally:
                self._block = outer

    @contextmanager
    def serving(self, parts: Mapping[str, Part]) -> Iterator[None]:
        """Within the block, each adapter serves its part of the batch."""
        try:
            with self.following(tuple(parts), tuple(map(self.step, parts, parts.values()))):
                yield
        finally:
            for part in parts.values():
                part.forget()

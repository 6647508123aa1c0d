"""Which adapters act, and on which part of a batch. One `Route` is shared by all layers of a model and is all they
look at.

Shapes: N rows of a batch, T tokens; `...` any further dimensions.
"""

import reprlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from veneer.errors import AdapterNameError, AttachError, MergeError

_Made = TypeVar("_Made")

BASE = "__base__"  # where rows name their adapters: none


def as_names(names: str | Iterable[str]) -> list[str]:
    """One name or several, as a list. Raises AdapterNameError if they are no names."""
    found = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    strange = [name for name in found if not isinstance(name, str)]
    if strange:
        raise AdapterNameError(f"The name of an adapter is a text, not {reprlib.repr(strange[0])}.")
    return found


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


class RoutedCheckpoint:
    """A gradient-checkpointing function that recomputes with the adapters of forward time.

    Without it, an adapter switched between forward and backward would be recomputed in place of the one whose
    output was used, and gradients would be silently wrong.
    """

    def __init__(self, checkpoint: Callable[..., Any], route: Route) -> None:
        self.checkpoint = checkpoint
        self.route = route

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` under the wrapped checkpointing, now and at recompute on the route of now.

        Raises MergeError at recompute if the weights of the base are others by then.
        """
        acting, plan, weights = self.route.acting, self.route.plan, (self.route.merged, self.route.standing)

        def run(*inputs: Any, **named: Any) -> Any:
            if weights != (self.route.merged, self.route.standing):
                raise MergeError(
                    "Between forward and backward, adapters were merged or unmerged, or one was switched that replaces "
                    "biases or weights of the base, so gradient checkpointing cannot compute the forward again: call "
                    "backward before that, or put things back first."
                )
            if (self.route.acting, self.route.plan) == (acting, plan):  # at forward time, so in the threads it has
                return function(*inputs, **named)
            with self.route.following(acting, plan):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)

"""The ways to combine adapters, as a table, and the options that go with them.

A way is a row: what is kept of each adapter (all, the largest values, a random part), how the kept parts are joined
(added, or added where they agree on a sign), and on what this is done: on the factors A and B, on the updates B A,
which an SVD then brings back to a low rank, or not at all: `cat` stacks the factors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from veneer.functional.combine_factors import Update
from veneer.functional.combine_sparse import add, add_agreeing, keep_all, keep_at_random, keep_largest
from veneer.functional.combine_svd import clamped, truncated, truncated_product


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How adapters are to be combined: the options of `add_weighted_adapter`, by PEFT's names.

    combination_type      a key of COMBINATIONS
    svd_rank              the rank of the result; None: the highest of the adapters' ranks
    svd_clamp             cut the factors at this quantile of their values, such as 0.99; None: leave them
    svd_full_matrices     accepted as PEFT's name; it never changes the result, and the reduced matrices are computed
    svd_driver            the cuSOLVER method, on CUDA only: gesvd, gesvdj, gesvda; None: torch chooses
    density               the fraction of values that pruning keeps, above 0 and at most 1
    majority_sign_method  how a sign is elected: by the sum of values ("total") or by heads ("frequency")
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def method(self) -> "Method":
        """The row of the table; KeyError if there is none of that name."""
        return COMBINATIONS[self.combination_type]


@dataclass(frozen=True)
class Method:
    """One way to combine.

    on    "rows" (the factors are stacked), "factors" (A with A, B with B) or "deltas" (B A with B A, then an SVD)
    keep  what of each tensor is kept
    join  how what was kept is joined
    """

    on: Literal["rows", "factors", "deltas"]
    keep: Callable[[Tensor, float, Generator | None], Tensor] = keep_all
    join: Callable[[Sequence[Tensor], Sequence[float], str], Tensor] = add

    @property
    def equal_ranks(self) -> bool:
        """Whether all adapters must have one rank."""
        return self.on == "factors"

    @property
    def uses_svd(self) -> bool:
        """Whether the options named svd_... mean anything."""
        return self.on == "deltas"

    @property
    def prunes(self) -> bool:
        """Whether it needs a density."""
        return self.keep is not keep_all

    @property
    def elects(self) -> bool:
        """Whether majority_sign_method means anything."""
        return self.join is add_agreeing

    def mixed(
        self, tensors: Sequence[Tensor], weights: Sequence[float], options: Combination, generator: Generator | None
    ) -> Tensor:
        """Tensors of one shape, each pruned, weighted and joined with the others."""
        density = 1.0 if options.density is None else options.density
        return self.join([self.keep(t, density, generator) for t in tensors], weights, options.majority_sign_method)


COMBINATIONS: dict[str, Method] = {
    "svd": Method("deltas"),
    "linear": Method("factors"),
    "cat": Method("rows"),
    "ties": Method("factors", keep_largest, add_agreeing),
    "ties_svd": Method("deltas", keep_largest, add_agreeing),
    "dare_ties": Method("factors", keep_at_random, add_agreeing),
    "dare_linear": Method("factors", keep_at_random, add),
    "dare_ties_svd": Method("deltas", keep_at_random, add_agreeing),
    "dare_linear_svd": Method("deltas", keep_at_random, add),
    "magnitude_prune": Method("factors", keep_largest, add),
    "magnitude_prune_svd": Method("deltas", keep_largest, add),
}


def stack_rows(
    updates: Sequence[Update], weights: Sequence[float], options: Combination, generator: Generator | None = None
) -> Update:
    """Σ wᵢ sᵢ Bᵢ Aᵢ exactly: the factors side by side, each A with its weight and scale in it."""
    scales = [weight * update.scale for weight, update in zip(weights, updates, strict=True)]
    by_group = zip(*(update.blocks() for update in updates), strict=True)
    return updates[0].with_blocks(
        [
            (torch.cat([A * s for (A, _), s in zip(block, scales, strict=True)]), torch.cat([B for _, B in block], 1))
            for block in by_group
        ]
    )


def mix_factors(
    updates: Sequence[Update], weights: Sequence[float], options: Combination, generator: Generator | None = None
) -> Update:
    """A from the As and B from the Bs, with √|w s| on each side and the sign of w s on A.

    Cheap and rough: the product of two sums has cross terms Bᵢ Aⱼ that Σ wᵢ sᵢ Bᵢ Aᵢ has not.
    """
    scales = [weight * update.scale for weight, update in zip(weights, updates, strict=True)]
    roots = [math.sqrt(abs(s)) for s in scales]
    signed = [math.copysign(root, s) for root, s in zip(roots, scales, strict=True)]
    A = options.method.mixed([update.A for update in updates], signed, options, generator)
    B = options.method.mixed([update.B for update in updates], roots, options, generator)
    return Update(A, B)


def mix_deltas(
    updates: Sequence[Update], weights: Sequence[float], options: Combination, generator: Generator | None = None
) -> Update:
    """The factors of given rank nearest to the mixture of the updates sᵢ Bᵢ Aᵢ."""
    first, rank = updates[0], combined_rank(options, [update.rank for update in updates])
    rank, driver = rank // first.groups, options.svd_driver
    if options.combination_type == "svd" and options.svd_clamp is None:
        stacked = stack_rows(updates, weights, options)
        return first.with_blocks([truncated_product(A, B, rank, driver=driver) for A, B in stacked.blocks()])
    delta_OI = options.method.mixed([update.delta() for update in updates], weights, options, generator)
    nearest = first.with_blocks([truncated(D, rank, driver=driver) for D in delta_OI.chunk(first.groups)])
    if options.svd_clamp is None:
        return nearest
    return Update(*clamped(nearest.A, nearest.B, options.svd_clamp))


RUNS: dict[str, Callable[[Sequence[Update], Sequence[float], Combination, Generator | None], Update]] = {
    "rows": stack_rows,
    "factors": mix_factors,
    "deltas": mix_deltas,
}


def combined_rank(options: Combination, ranks: Sequence[int]) -> int:
    """The rank of the combination of adapters with these ranks: the sum for `cat`, `svd_rank` or else the highest."""
    if options.method.on == "rows":
        return sum(ranks)
    return options.svd_rank or max(ranks)

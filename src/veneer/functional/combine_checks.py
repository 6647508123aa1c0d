"""Everything that can be wrong with a combination of adapters, found before anything is computed."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from veneer.functional.combine_factors import Update
from veneer.functional.combine_methods import COMBINATIONS, Combination, combined_rank
from veneer.functional.combine_sparse import keep_largest, kept
from veneer.suggest import did_you_mean

DRIVERS = ("gesvd", "gesvdj", "gesvda")
VOTES = ("total", "frequency")


def problems_of(options: Combination, names: Sequence[str], weights: Sequence[float]) -> list[str]:
    """What is wrong with the options, or with the weights given to the adapters of these names; no tensor is needed."""
    return [*_weight_problems(names, weights), *_option_problems(options)]


def _weight_problems(names: Sequence[str], weights: Sequence[float]) -> Iterator[str]:
    if not names:
        yield "adapters: none are given; name at least one"
    if len(weights) != len(names):
        yield f"weights: {len(weights)} for {len(names)} adapters ({', '.join(names)}); give each adapter one"
    for name, weight in zip(names, weights, strict=False):
        if not _is_number(weight):
            yield f"weights: {weight!r} for adapter {name} is not a finite number"


def _option_problems(options: Combination) -> Iterator[str]:
    name = options.combination_type
    if not isinstance(name, str) or name not in COMBINATIONS:
        hint = did_you_mean(name, COMBINATIONS) if isinstance(name, str) else ""
        yield f"combination_type: {name!r} is none of {', '.join(COMBINATIONS)}{hint}"
        return
    yield from chain(_density_problems(options), _svd_problems(options), _majority_problems(options))


def _density_problems(options: Combination) -> Iterator[str]:
    density, name = options.density, options.combination_type
    if not options.method.prunes:
        if density is not None:
            yield f"density: {name} prunes nothing; leave it out, or choose {_types(lambda m: m.prunes)}"
    elif density is None:
        yield f"density: {name} needs it, a fraction above 0 and at most 1, such as 0.5"
    elif not _is_number(density) or not 0 < density <= 1:
        yield f"density: {density!r} must be a number above 0 and at most 1"


def _svd_problems(options: Combination) -> Iterator[str]:
    if not options.method.uses_svd:
        given = {
            "svd_rank": options.svd_rank is not None,
            "svd_clamp": options.svd_clamp is not None,
            "svd_full_matrices": options.svd_full_matrices is not True,
            "svd_driver": options.svd_driver is not None,
        }
        for field in (field for field, is_given in given.items() if is_given):
            svds = _types(lambda m: m.uses_svd)
            yield f"{field}: {options.combination_type} does no SVD; leave it out, or choose {svds}"
        return
    if options.svd_rank is not None and not _is_rank(options.svd_rank):
        yield f"svd_rank: {options.svd_rank!r} must be None or an integer of at least 1"
    if options.svd_clamp is not None and not (_is_number(options.svd_clamp) and 0 < options.svd_clamp <= 1):
        yield f"svd_clamp: {options.svd_clamp!r} must be None or a quantile above 0 and at most 1, such as 0.99"
    if not isinstance(options.svd_full_matrices, bool):
        yield f"svd_full_matrices: {options.svd_full_matrices!r} must be True or False"
    if options.svd_driver is not None and options.svd_driver not in DRIVERS:
        yield f"svd_driver: {options.svd_driver!r} must be None or one of {', '.join(DRIVERS)}"


def _majority_problems(options: Combination) -> Iterator[str]:
    vote, name = options.majority_sign_method, options.combination_type
    if vote not in VOTES:
        hint = did_you_mean(vote, VOTES) if isinstance(vote, str) else ""
        yield f"majority_sign_method: {vote!r} must be one of {', '.join(VOTES)}{hint}"
    elif vote != VOTES[0] and not options.method.elects:
        yield f"majority_sign_method: {name} elects no signs; leave it out, or choose {_types(lambda m: m.elects)}"


def layer_problems(options: Combination, names: Sequence[str], updates: Sequence[Update]) -> list[str]:
    """Why these updates of one layer cannot be combined so. The options must be free of problems."""
    misfits = list(_misfits(options, names, updates))
    return misfits or list(_value_problems(options, names, updates))


def _misfits(options: Combination, names: Sequence[str], updates: Sequence[Update]) -> Iterator[str]:
    first = updates[0]
    for name, update in zip(names, updates, strict=True):
        A, B = update.A, update.B
        if min(A.dim(), B.dim()) < 2 or B.shape[1] == 0 or A.shape[0] % B.shape[1] or any(n != 1 for n in B.shape[2:]):
            yield f"adapter {name}: A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)} do not multiply"
        elif (A.shape[1:], B.shape[:1], update.groups) != (first.A.shape[1:], first.B.shape[:1], first.groups):
            yield f"adapter {name} has an update of shape {_shape(update)}, {names[0]} one of {_shape(first)}"
        if A.device != first.A.device or B.device != first.A.device:
            yield f"adapter {name} is on {B.device}, {names[0]} on {first.A.device}; move them to one device"
    ranks = {name: update.rank for name, update in zip(names, updates, strict=True)}
    if options.method.equal_ranks and len({update.rank for update in updates}) > 1:
        listed = ", ".join(f"{name} has {rank}" for name, rank in ranks.items())
        yield f"{options.combination_type} needs adapters of one rank, but {listed}; svd and cat take any"
    if options.method.uses_svd and combined_rank(options, list(ranks.values())) % first.groups:
        yield f"svd_rank: {options.svd_rank} does not divide among the {first.groups} groups of the convolution"
    if options.svd_driver is not None and first.A.device.type != "cuda":
        yield f"svd_driver: it works on CUDA only, and the adapters are on {first.A.device}; leave it out"


def _value_problems(options: Combination, names: Sequence[str], updates: Sequence[Update]) -> Iterator[str]:
    for name, update in zip(names, updates, strict=True):
        if not _is_number(update.scale):
            yield f"adapter {name}: its scale is {update.scale!r}, which is not a finite number"
        for factor, values in (("A", update.A), ("B", update.B)):
            if not values.is_floating_point():
                yield f"adapter {name}: {factor} has {values.dtype} values; only floating-point factors combine"
            elif not _all_finite(values):
                yield f"adapter {name}: {factor} has values that are not finite"
    if options.method.keep is keep_largest and options.density is not None:
        A, B = updates[0].A, updates[0].B
        counts = {"A": A.numel(), "B": B.numel()} if options.method.equal_ranks else {"B A": math.prod(updates[0].size)}
        for part, count in counts.items():
            if kept(options.density, count) == 0:
                yield f"density: {options.density!r} keeps none of the {count} values of {part}; raise it"


def _all_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _shape(update: Update) -> str:
    parts = "x".join(str(n) for n in (update.B.shape[0], *update.A.shape[1:]))
    return parts if update.groups == 1 else f"{parts} in {update.groups} groups"


def _types(has: Any) -> str:
    return ", ".join(name for name, method in COMBINATIONS.items() if has(method))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1

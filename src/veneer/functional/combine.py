"""Several adapters of one layer made into one: the maths of `add_weighted_adapter`.

    a, b = Update(A_1, B_1, scale_1), Update(A_2, B_2, scale_2)
    combine([a, b], [0.7, -0.3], Combination(combination_type="ties", density=0.5), names=["chat", "code"])

The result has scale 1: its config says lora_alpha = r and use_rslora = False.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Generator

from veneer.errors import ConfigError, MergeError, bullet_list
from veneer.functional.combine_checks import layer_problems, problems_of
from veneer.functional.combine_factors import Update
from veneer.functional.combine_methods import COMBINATIONS, RUNS, Combination, Method, combined_rank


def check_combination(options: Combination, names: Sequence[str], weights: Sequence[float]) -> None:
    """Raise ConfigError with every problem of the options and weights for the adapters of these names."""
    problems = problems_of(options, names, weights)
    if problems:
        raise ConfigError(bullet_list(f"Adapters {', '.join(names) or '(none)'} cannot be combined:", problems))


@torch.no_grad()
def combine(
    updates: Sequence[Update],
    weights: Sequence[float],
    options: Combination,
    *,
    names: Sequence[str] | None = None,
    generator: Generator | None = None,
) -> Update:
    """One update of scale 1 from several of one layer, in the dtype that holds all of theirs.

    `cat` is Σ wᵢ sᵢ Bᵢ Aᵢ exactly; `svd` is the nearest to it of its rank, so exact if that rank is high enough.
    Computed in 32 bits at least and rounded once. Each weight counts, be it positive, negative or zero.

    names      what errors call the adapters
    generator  the source of randomness of the types that begin with "dare"; on the device of the factors

    Raises ConfigError, which lists all problems, and MergeError if the result overflows its dtype.
    """
    names = [str(place) for place in range(1, len(updates) + 1)] if names is None else list(names)
    assert len(names) == len(updates)
    check_combination(options, names, weights)
    problems = layer_problems(options, names, updates)
    if problems:
        raise ConfigError(bullet_list(f"Adapters {', '.join(names)} cannot be combined:", problems))
    dtype = reduce(torch.promote_types, (t.dtype for update in updates for t in (update.A, update.B)))
    wide = torch.promote_types(dtype, torch.float32)
    result = RUNS[options.method.on]([update.to(wide) for update in updates], weights, options, generator)
    rounded = result.to(dtype)
    if not (rounded.A.isfinite().all() and rounded.B.isfinite().all()):
        raise MergeError(
            f"The combination of {', '.join(names)} does not fit into {dtype}: convert the adapters to float32 first."
        )
    return rounded


__all__ = [
    "COMBINATIONS",
    "Combination",
    "Method",
    "Update",
    "check_combination",
    "combine",
    "combined_rank",
    "layer_problems",
    "problems_of",
]

"""How the factors of a new adapter start: one file a method, `INITS` the table.

An initialiser sees the shape and, if it asks, the values of one weight; never a layer.
"""

from collections.abc import Callable

from torch import Generator

from veneer.init.factors import Factors, Weight
from veneer.init.random import embedding_default, gaussian, kaiming, kaiming_both, normal_both

Initialiser = Callable[..., Factors]

INITS: dict[str, Initialiser] = {
    "kaiming": kaiming,
    "kaiming_both": kaiming_both,
    "gaussian": gaussian,
    "embedding_default": embedding_default,
    "normal_both": normal_both,
}


def initialise(name: str, weight: Weight, rank: int, *, generator: Generator | None = None) -> Factors:
    """Factors of the given rank by the method `name`, on the weight's device, in float32."""
    made = INITS[name](weight, rank, generator=generator)
    return Factors(made.A.to(weight.device), made.B.to(weight.device))


__all__ = ["INITS", "Factors", "Initialiser", "Weight", "initialise"]

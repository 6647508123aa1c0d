"""How the factors of a new adapter start: one file a method, `INITS` the table.

An initialiser sees the shape and, if it asks, the values of one weight, and what was measured for it; never a layer.
It changes nothing: `Factors` says what its caller has to do beside laying A and B on the layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from veneer.config.init_names import OPTIONS_FIELD, split_name
from veneer.config.sub_configs import SubConfig
from veneer.errors import ConfigError
from veneer.init.corda import CordaParts, corda
from veneer.init.eva import eva
from veneer.init.factors import Components, Factors, Weight
from veneer.init.loftq import loftq
from veneer.init.lora_ga import lora_ga
from veneer.init.mica import mica
from veneer.init.olora import olora
from veneer.init.orthogonal import orthogonal
from veneer.init.pissa import pissa
from veneer.init.random import embedding_default, gaussian, kaiming, kaiming_both, normal_both

Initialiser = Callable[..., Factors]
# What may be measured for one layer.
Measured = Tensor | Components | CordaParts

INITS: dict[str, Initialiser] = {
    "kaiming": kaiming,
    "kaiming_both": kaiming_both,
    "gaussian": gaussian,
    "embedding_default": embedding_default,
    "normal_both": normal_both,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
    "loftq": loftq,
    "mica": mica,
    "eva": eva,
    "corda": corda,
    "lora_ga": lora_ga,
}
# Those that look at nothing but the shape; the first three can start a grouped convolution as well.
SHAPE_ONLY = ("kaiming", "kaiming_both", "gaussian", "embedding_default", "normal_both")
GROUPED = SHAPE_ONLY[:3]
# Those whose A depends on the inputs alone and whose B is zero: one draw of all ranks starts a whole stack of matrices.
STARTS_BY_INPUTS = ("kaiming",)
# What the data-driven methods are given.
_STATS: dict[str, tuple[type, ...]] = {"eva": (Components,), "corda": (Tensor, CordaParts), "lora_ga": (Tensor,)}


@torch.no_grad()
def initialise(
    name: str,
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: SubConfig | Mapping[str, Any] | None = None,
    stats: Measured | None = None,
    generator: Generator | None = None,
) -> Factors:
    """Factors of the given rank by the method `name`, on the weight's device, in float32.

    name       a key of `INITS`, or "pissa_niter_" and a number
    scale      s, by which the adapter multiplies B A
    options    the settings of loftq, eva, corda or lora_ga, as their sub-config or a dict; None for the defaults
    stats      what was measured for this layer. eva: `Components` of its inputs; corda: their covariance, (I, I), or
               `CordaParts`;
               lora_ga: the mean gradient of the weight, (O, I)
    generator  decides every random number; None for torch's own

    Raises ConfigError if the method cannot start on this layer, and for options or stats that it does not take.
    """
    method, niter = (name, None) if name in INITS else split_name(name)
    if weight.groups > 1 and method not in GROUPED:
        raise ConfigError(
            f"{name!r} starts from a weight that is a matrix, and that of a convolution with groups={weight.groups} is "
            "none: choose True or 'gaussian' for init_lora_weights, or leave the layer out of target_modules."
        )
    if options is not None and method not in OPTIONS_FIELD:
        raise ConfigError(f"{name!r} takes no options: leave {options!r} out.")
    if stats is not None:
        _check_stats(method, stats)
    number = {} if niter is None else {"niter": niter}
    made = INITS[method](weight, rank, scale=scale, options=options, stats=stats, generator=generator, **number)
    if method in SHAPE_ONLY:  # made for this alone
        return Factors(made.A.to(weight.device), made.B.to(weight.device))
    return Factors(
        _placed(made.A, weight.device),
        _placed(made.B, weight.device),
        subtract=made.subtract,
        base=None if made.base is None else _placed(made.base, weight.device),
        frozen=made.frozen,
    )


def _check_stats(method: str, stats: object) -> None:
    if method not in _STATS:
        raise ConfigError(f"{method!r} takes no stats; {', '.join(_STATS)} do.")
    kinds = _STATS[method]
    if not isinstance(stats, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{method!r} takes a {names} as stats, not {type(stats).__name__}.")


def _placed(X: Tensor, device: torch.device) -> Tensor:
    """In memory of its own: a part of a decomposition would keep the whole alive."""
    return torch.empty(X.shape, dtype=torch.float32, device=device).copy_(X)


__all__ = [
    "GROUPED",
    "INITS",
    "STARTS_BY_INPUTS",
    "Components",
    "CordaParts",
    "Factors",
    "Initialiser",
    "Measured",
    "Weight",
    "initialise",
]

"""The names that `init_lora_weights` may have, and what each asks for. Names only: the maths is in `veneer.init`."""

import re
from typing import Any

from veneer.errors import ConfigError
from veneer.suggest import did_you_mean

INIT_NAMES = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "mica", "eva", "corda", "lora_ga")
# The update that the adapter starts with is taken off the base, so that the model starts unchanged.
SUBTRACTING = ("pissa", "olora", "corda", "lora_ga")
# Something has to be measured on data first.
DATA_DRIVEN = ("eva", "corda", "lora_ga")
# The field of a LoraConfig that holds the settings of a method.
OPTIONS_FIELD = {"loftq": "loftq_config", "eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}
# The factors that a method does not train.
FROZEN = {"mica": ("B",)}

_NITER = re.compile(r"pissa_niter_([1-9][0-9]{0,2})", re.ASCII)


def split_name(name: str) -> tuple[str, int | None]:
    """The method and its number: only pissa has one, the subspace iterations of its fast SVD (1 to 999).

    Raises ConfigError for a name that is none.

    >>> split_name("pissa_niter_16"), split_name("olora")
    (('pissa', 16), ('olora', None))
    """
    if found := _NITER.fullmatch(name):
        return "pissa", int(found[1])
    if name in INIT_NAMES:
        return name, None
    if name.startswith("pissa_"):
        raise ConfigError(f"{name!r}: write 'pissa', or 'pissa_niter_' and a whole number from 1 to 999")
    hint = did_you_mean(name, INIT_NAMES) or f"; there are {', '.join(INIT_NAMES)} and pissa_niter_[a number]"
    raise ConfigError(f"{name!r} is no initialisation{hint}")


def known_init(value: Any) -> bool:
    """Whether `init_lora_weights` may have this value: True, False or the name of a method."""
    if not isinstance(value, str):
        return isinstance(value, bool)
    return value in INIT_NAMES or _NITER.fullmatch(value) is not None

"""What was measured on data for an initialisation, kept on the model until the adapter is made."""

from collections.abc import Mapping

from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.config.init_names import DATA_DRIVEN, split_name
from veneer.errors import ConfigError
from veneer.init import Components

Statistics = Mapping[str, Tensor | Components]
_ATTRIBUTE = "_veneer_statistics"
_MEASURE = {"corda": "preprocess_corda(model, config, run_model)", "lora_ga": "preprocess_loraga(model, config, step)"}


def data_driven(config: LoraConfig) -> str | None:
    """The name of the initialisation if it needs data, else None."""
    choice = config.init_lora_weights
    method = split_name(choice)[0] if isinstance(choice, str) else None
    return method if method in DATA_DRIVEN else None


def keep_statistics(model: nn.Module, method: str, statistics: Statistics) -> None:
    """Keep what was measured for `method`, by the path of each layer, until an adapter is made with it."""
    vars(model)[_ATTRIBUTE] = (method, dict(statistics))


def kept_statistics(model: nn.Module, config: LoraConfig) -> Statistics:
    """What was measured for the config's initialisation; empty if it needs nothing, or if EVA waits for its data.

    Raises ConfigError if it needs what was not measured.
    """
    wanted = data_driven(config)
    method, statistics = vars(model).get(_ATTRIBUTE, (None, {}))
    if wanted is None or wanted == method:
        return statistics if wanted else {}
    if wanted == "eva":
        return {}
    raise ConfigError(
        f"init_lora_weights={wanted!r} needs something measured on data first: call {_MEASURE[wanted]}, then attach."
    )


def forget_statistics(model: nn.Module) -> None:
    """Free what was kept."""
    vars(model).pop(_ATTRIBUTE, None)

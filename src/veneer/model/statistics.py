"""What was measured on data for an initialisation, kept on the model until the adapter is made."""

from collections.abc import Iterable, Mapping

from torch import nn

from veneer.config import LoraConfig
from veneer.config.init_names import DATA_DRIVEN, split_name
from veneer.errors import ConfigError, bullet_list
from veneer.init import Measured

Statistics = Mapping[str, Measured]
_ATTRIBUTE = "_veneer_statistics"
_MEASURE = {
    "corda": "preprocess_corda(model, config, run_model)",
    "lora_ga": "preprocess_loraga(model, config, train_step)",
}


def data_driven(config: LoraConfig) -> str | None:
    """The name of the initialisation if it needs data, else None."""
    choice = config.init_lora_weights
    method = split_name(choice)[0] if isinstance(choice, str) else None
    return method if method in DATA_DRIVEN else None


def keep_statistics(model: nn.Module, method: str, statistics: Statistics) -> None:
    """Keep what was measured for `method`, by the path of each layer, until an adapter is made with it."""
    vars(model)[_ATTRIBUTE] = (method, dict(statistics))


def kept_statistics(model: nn.Module, config: LoraConfig, paths: Iterable[str]) -> Statistics:
    """What was measured for the config's initialisation; empty if it needs nothing, or if EVA waits for its data.

    paths  the layers that will be adapted

    Raises ConfigError if it needs what was not measured.
    """
    wanted = data_driven(config)
    if wanted is None or wanted == "eva":  # EVA is given its data once the adapter is there
        return {}
    method, statistics = vars(model).get(_ATTRIBUTE, (None, {}))
    if wanted == method:
        if missing := [path for path in paths if path not in statistics]:
            raise ConfigError(
                bullet_list(
                    f"init_lora_weights={wanted!r}: {len(missing)} layer(s) were not measured. Give "
                    f"{_MEASURE[wanted].partition('(')[0]} the config that the adapter is made with:",
                    missing[:6],
                )
            )
        return statistics
    raise ConfigError(
        f"init_lora_weights={wanted!r} needs something measured on data first: call {_MEASURE[wanted]}, then attach."
    )


def forget_statistics(model: nn.Module, config: LoraConfig) -> None:
    """Free what was kept, unless the config the adapter was made with says that another one will use it."""
    if config.corda_config is None or config.corda_config.prune_temporary_fields:
        vars(model).pop(_ATTRIBUTE, None)

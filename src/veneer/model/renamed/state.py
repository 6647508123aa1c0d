"""Values in memory with the names that an older version of the model had, for an adapter that is on the model now."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.model.renamed.file import read_renamed
from veneer.model.renamed.pieces import FACTOR_A
from veneer.storage import keys
from veneer.storage.header import Header, TensorInfo
from veneer.targets import Resolution


def with_todays_names(
    model: nn.Module, config: LoraConfig, resolution: Resolution, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values by today's names; as they are if they have them.

    config, resolution  of the adapter that they are for: they were trained for its scale, whatever their rank

    Raises AdapterFileError if some names lead nowhere.
    """
    ranks = {key[len(keys.PREFIX) : -len(FACTOR_A)]: len(A) for key, A in state.items() if key.endswith(FACTOR_A)}
    scales = {site.scale for site in resolution.sites}
    if not ranks or len(scales) != 1:
        return dict(state)
    scale = scales.pop()
    then = config.changed(
        target_modules=list(ranks),
        rank_pattern={rf"^{path}": rank for path, rank in ranks.items()},
        alpha_pattern={
            rf"^{path}": scale * (math.sqrt(rank) if config.use_rslora else rank) for path, rank in ranks.items()
        },
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    )
    return adapter_of_today(model, then, state)[1]


def adapter_of_today(
    model: nn.Module, config: LoraConfig, state: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(config, values) with today's names, from those of an adapter as a file would hold them.

    Raises AdapterFileError if some names lead nowhere.
    """
    tensors = {key: TensorInfo("F32", tuple(value.shape), 0, 0) for key, value in state.items()}
    renamed = read_renamed(model, Path("The state dict"), config, Header(tensors, {}, 0))
    return (config, dict(state)) if renamed is None else (renamed.config, renamed.values(state))

"""A saved adapter as transformers' `load_adapter` is given it: at a place, or as values in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.config import LoraConfig, config_in
from veneer.errors import ConfigError
from veneer.integrations.load_arguments import Source
from veneer.model.apply import activate
from veneer.model.files import load_adapter
from veneer.model.from_state import load_adapter_state
from veneer.model.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from veneer.model.tuner import LoraModel
from veneer.storage.hub import adapter_folder


@dataclass(frozen=True)
class SavedAdapter:
    """What is to be loaded.

    source  where it lies
    config  used instead of the one that lies there
    state   values by their names in an adapter file, used instead of those that lie there
    """

    source: Source
    config: LoraConfig | None
    state: Mapping[str, Tensor] | None

    def __post_init__(self) -> None:
        if self.source.location is None and (self.state is None or self.config is None):
            raise ConfigError(
                "There is nothing to load: give a peft_model_id, or a peft_config and an adapter_state_dict."
            )

    def lay_over(self, model: nn.Module, name: str, *, trainable: bool) -> None:
        """Attach it as a new adapter. Raises what loading a folder raises."""
        if self.state is None:
            load_adapter(model, name, self._folder(), trainable=trainable, config=self.config)
        else:
            load_adapter_state(model, name, self.config or self._config_there(), self.state, trainable=trainable)

    def put_in_place(self, model: nn.Module, name: str, *, trainable: bool) -> None:
        """Replace the values of adapter `name`, which acts then. Raises what `hotswap_adapter` raises."""
        if self.state is not None:
            hotswap_adapter_from_state_dict(model, self.state, name, self.config or self._config_there())
        elif self.config is not None:
            raise ConfigError("hotswap: the config that lies beside the values is used; leave peft_config out.")
        else:
            source = self.source
            hotswap_adapter(model, str(source.location), name, subfolder=source.subfolder, **source.hub)
        activate(model, (name,))
        LoraModel(model).set_requires_grad(name, trainable)

    def _folder(self, **options: Any) -> Path:
        return adapter_folder(str(self.source.location), subfolder=self.source.subfolder, **options, **self.source.hub)

    def _config_there(self) -> LoraConfig:
        return config_in(self._folder(weights=False))

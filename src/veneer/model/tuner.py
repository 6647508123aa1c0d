"""LoraModel: the middle one of PEFT's three models, `peft_model.base_model`."""

from typing import Any

from torch import nn

from veneer.model.methods import AdapterMethods


class LoraModel(AdapterMethods):
    """A model with adapters laid over it. `model` is the user's own, changed in place; unknown attributes are its."""

    prefix = "lora_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def bare(self) -> nn.Module:
        """The user's own model."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, with the active adapters."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not built yet, as while unpickling
                raise
            return getattr(self.model, name)

"""LoraModel: the middle one of PEFT's three models, `peft_model.base_model`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from veneer.model.batch import serving
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

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward, with the active adapters, or with those of each row.

        adapter_names  the adapter of each row of the batch, `"__base__"` for none
        alora_offsets  for adapters with alora_invocation_tokens: how many of its last tokens they act on in each row,
                       None for none; found in the token ids unless given

        Raises AdapterNameError, ArgumentError, AttachError or MergeError, and then nothing was computed.
        """
        if adapter_names is None and alora_offsets is None:
            return self.model(*args, **kwargs)
        with serving(self.model, args, kwargs, adapter_names=adapter_names, alora_offsets=alora_offsets):
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not built yet, as while unpickling
                raise
            return getattr(self.model, name)

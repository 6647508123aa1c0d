"""The names of tensors in an adapter file, taken apart: what of the model they speak of, and what PEFT added."""

from collections.abc import Set
from functools import cached_property, lru_cache

from torch import nn

from veneer.model.renamed.former_names import Place
from veneer.storage import keys
from veneer.targets.structure import Structure

# Where in a name what PEFT added begins; before it stands the path of a module.
MARKS = (".lora_", ".base_layer", ".token_adapter.", ".modules_to_save.", ".original_module.")


class Known:
    """What names a model has."""

    def __init__(self, structure: Structure, model: nn.Module) -> None:
        self.modules = structure.modules
        self._model = model

    @cached_property
    def values(self) -> Set[str]:
        """The names of the model's values; made only where a file has such a name."""
        return self._model.state_dict().keys()

    def has(self, key: str) -> bool:
        """Whether the tensor of this name would be of something that the model has."""
        path = split(key)[0]
        return path in self.modules or (path == key and key in self.values)

    def has_place(self, place: Place) -> bool:
        """Whether the model has what a place names."""
        return place.name in self.values or place.name.removesuffix(".weight") in self.modules


def plain_name(key: str) -> str:
    """A name in an adapter file as the model has it."""
    return key.removeprefix(keys.PREFIX)


@lru_cache(maxsize=1 << 16)
def split(key: str) -> tuple[str, str]:
    """(path of a module, what PEFT added), or (full name of a value, nothing)."""
    cut = min((place for mark in MARKS if (place := key.find(mark)) >= 0), default=len(key))
    return key[:cut], key[cut:]


def probed(key: str) -> str:
    """The name of the weight whose place tells where the tensor belongs."""
    path, added = split(key)
    return f"{path}.weight" if added else path


def shown(name: str) -> str:
    """A name with a star for each number, so that those of one sort are shown once."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)

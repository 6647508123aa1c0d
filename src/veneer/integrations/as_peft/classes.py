"""PEFT's names for kinds of layers and models, as programs use them: in `isinstance`."""

from abc import ABC, ABCMeta
from typing import Any, ClassVar

from torch import nn

from veneer.errors import ArgumentError
from veneer.layers.attach import Adapted
from veneer.layers.by_weight import ByWeight
from veneer.layers.saved_module import Saved
from veneer.layers.token_rows import WithRows

BaseTunerLayer = LoraLayer = Adapted
ModulesToSaveWrapper = Saved
TrainableTokensWrapper = WithRows
ParamWrapper = ByWeight


class AuxiliaryTrainingWrapper(ABC):  # noqa: B024
    """What is trained beside the factors: full copies of modules, rows of embeddings."""


AuxiliaryTrainingWrapper.register(Saved)
AuxiliaryTrainingWrapper.register(WithRows)


class _AdaptedKind(ABCMeta):
    """Classes whose instances are the adapted layers of one kind."""

    kind: type[nn.Module]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Adapted) and isinstance(instance, cls.kind)


class _NotMade:
    """A name that is only asked about."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ArgumentError(f"peft.{cls.__name__} is not part of Veneer, which has LoRA alone.")


class Linear(_NotMade, metaclass=_AdaptedKind):
    """Adapted `nn.Linear`."""

    kind: ClassVar[type[nn.Module]] = nn.Linear


class Embedding(_NotMade, metaclass=_AdaptedKind):
    """Adapted `nn.Embedding`."""

    kind: ClassVar[type[nn.Module]] = nn.Embedding


class Conv1d(_NotMade, metaclass=_AdaptedKind):
    """Adapted `nn.Conv1d`."""

    kind: ClassVar[type[nn.Module]] = nn.Conv1d


class Conv2d(_NotMade, metaclass=_AdaptedKind):
    """Adapted `nn.Conv2d`."""

    kind: ClassVar[type[nn.Module]] = nn.Conv2d


class Conv3d(_NotMade, metaclass=_AdaptedKind):
    """Adapted `nn.Conv3d`."""

    kind: ClassVar[type[nn.Module]] = nn.Conv3d


class _AdaptedOfName(ABCMeta):
    """Classes whose instances are the adapted layers of a class of this name, which need not be installed."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Adapted) and cls.__name__ in {one.__name__ for one in type(instance).__mro__}


class Linear8bitLt(_NotMade, metaclass=_AdaptedOfName):
    """Adapted layers of bitsandbytes in 8 bits."""


class Linear4bit(_NotMade, metaclass=_AdaptedOfName):
    """Adapted layers of bitsandbytes in 4 bits."""


class PromptLearningConfig(_NotMade):
    """Configs of prompt learning; nothing is one."""


class PrefixTuningConfig(PromptLearningConfig):
    """Configs of prefix tuning; nothing is one."""


class PeftMixedModel(_NotMade):
    """Models that mix LoRA with other methods; nothing is one."""


class LoHaLayer(_NotMade):
    """Layers of LoHa; nothing is one."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()


class LoKrLayer(LoHaLayer):
    """Layers of LoKr; nothing is one."""

"""What TRL's trainers have to be told beyond what transformers' Trainer is: a facade's kind, and a trained output head.

They multiply by `lm_head.weight` themselves, past the head's own forward (see fused_head.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from veneer.model.fused_head import readable_head
from veneer.model.overlay import overlay_of
from veneer.model.wrapped import inwards
from veneer.on_import import stand_before, when_imported

_TRAINERS = (
    "trl.trainer.base_trainer",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.kto_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.rloo_trainer",
)
_UTILITIES = "trl.trainer.utils"
_CLASSES = ("BaseTunerLayer", "LoraConfig")  # of PEFT, asked for once a model is known to be a facade


def teach_trl(facade: type[nn.Module]) -> None:
    """Let TRL's trainers know models with adapters. A second time does nothing.

    facade  the class whose models hold the adapted one, with PEFT's methods
    """

    def tell(module: ModuleType) -> None:
        _tell(facade, module)

    for name in (_UTILITIES, *_TRAINERS):
        when_imported(name, tell)


def _tell(facade: type[nn.Module], module: ModuleType) -> None:
    """Put ours before the functions that a module has; the trainers import them from elsewhere by name."""

    def make_kind(theirs: Callable[..., bool]) -> Callable[..., bool]:
        def is_peft_model(model: Any) -> bool:
            return any(isinstance(one, facade) for one in inwards(model)) or theirs(model)

        return is_peft_model

    def make_adapter(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def use_adapter(model: Any, adapter_name: str | None) -> Any:
            return _reference(model, adapter_name) if isinstance(model, facade) else theirs(model, adapter_name)

        return use_adapter

    known = vars(module)
    for name, make in (("is_peft_model", make_kind), ("use_adapter", make_adapter), ("add_fused_lm_head", _make_head)):
        if name in known:
            stand_before(module, name, make)
    if module.__name__ in _TRAINERS:
        for name in _CLASSES:
            known.setdefault(name, ())


def _make_head(theirs: Callable[..., None]) -> Callable[..., None]:
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        theirs(model, *args, **kwargs)
        if overlay_of(model) is not None:
            model.forward = _with_head(model, model.forward)

    return add_fused_lm_head


@contextmanager
def _reference(model: Any, adapter_name: str | None) -> Iterator[None]:
    """Within the block the model is the reference: another adapter acts, or none."""
    if adapter_name is None:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapters
    model.set_adapter(adapter_name)
    try:
        yield
    finally:
        model.set_adapter(active)


def _with_head(model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward, in which the output head's weight is the one that acts (`readable_head`, which may raise)."""

    def with_head(*args: Any, **kwargs: Any) -> Any:
        with readable_head(model, kwargs):
            return forward(*args, **kwargs)

    with_head.__wrapped__ = forward  # type: ignore[attr-defined]  # generate reads the signature
    return with_head

"""What transformers' Trainer has to be told, so that it knows models with adapters as it knows PEFT's.

It asks whether a model is of PEFT's classes, and so takes a facade of ours for the model itself; and it cannot go on
with a model adapted in place, not even by PEFT. `docs/decisions/0007-teaching-trainer.md` says why it is told here.
Every function below answers for models with our adapters, and leaves all others to what it stands before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from veneer.errors import AttachError, MergeError
from veneer.model.files import save_adapter
from veneer.model.overlay import overlay_needed, overlay_of, sole_active
from veneer.model.pretrained import SAVE, is_guarded
from veneer.model.restore import restore_all
from veneer.model.sharded import is_sharded_model
from veneer.model.wrapped import inwards
from veneer.on_import import stand_before, when_imported

_UTILITIES = "transformers.trainer_utils"
_NEFTUNE = "transformers.integrations.neftune"
_TRAINER = "transformers.trainer"


def teach_trainer(facade: type[nn.Module]) -> None:
    """Let Trainer know models with adapters, if it is imported, or as soon as it is. A second time does nothing.

    facade  the class whose models hold the adapted one, with PEFT's methods
    """

    def knows(module: ModuleType) -> None:
        _answer_for(facade, module)

    def trains(module: ModuleType) -> None:
        knows(module)
        _save_facades(facade, module)
        _say_why_nothing_trains(facade, module)
        _go_on(facade, module)

    for name, tell in ((_UTILITIES, knows), (_NEFTUNE, knows), (_TRAINER, trains)):
        when_imported(name, tell)


def _answer_for(facade: type[nn.Module], module: ModuleType) -> None:
    """Let a module of transformers take a facade for what PEFT's is: something with the model to look at inside."""

    def make(theirs: Callable[..., bool]) -> Callable[..., bool]:
        def is_peft_model(model: nn.Module) -> bool:
            return isinstance(model, facade) or theirs(model)

        return is_peft_model

    stand_before(module, "_is_peft_model", make)


def _save_facades(facade: type[nn.Module], module: Any) -> None:
    """Let Trainer save a facade by its own `save_pretrained`, and put adapter files into what it uploads.

    It asks `isinstance(model, (PreTrainedModel, PeftModel))`, the second only where PEFT is.
    """
    theirs = vars(module).get("PeftModel", ())
    module.PeftModel = (facade, theirs)
    module.is_peft_available = lambda: True


def _say_why_nothing_trains(facade: type[nn.Module], module: Any) -> None:
    """Let Trainer refuse a model of which nothing trains in words, and not by autograd's at the first step."""

    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def train(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = _adapted(facade, self.model)
            if found is not None:
                _check_trains(found[0], self.model)
            return theirs(self, *args, **kwargs)

        return train

    stand_before(module.Trainer, "train", make)


def _check_trains(adapted: nn.Module, whole: nn.Module) -> None:
    """Raise MergeError if an adapter that acts is merged, AttachError if no parameter trains."""
    route = overlay_needed(adapted).route
    if merged := [name for name in route.active if name in route.merged]:
        raise MergeError(
            f"Nothing is trained while adapter {merged[0]!r} is merged: call unmerge_adapter() before training."
        )
    if not any(parameter.requires_grad for parameter in whole.parameters()):
        names = ", ".join(map(repr, route.active)) or "none is active"
        raise AttachError(
            f"Nothing here can be trained: adapter {names} is frozen. Load it with is_trainable=True to go on training "
            "it, or call set_requires_grad(name, True)."
        )


def _go_on(facade: type[nn.Module], module: Any) -> None:
    """Let Trainer give adapters the values of a checkpoint, and shard facades as it shards any model."""

    def make_resume(theirs: Callable[..., None]) -> Callable[..., None]:
        def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            found = None if self.is_fsdp_enabled else _adapted(facade, self.model if model is None else model)
            if found is None or not restore_all(*found, Path(resume_from_checkpoint)):
                theirs(self, resume_from_checkpoint, model)

        return load_from_checkpoint

    def make_best(theirs: Callable[..., None]) -> Callable[..., None]:
        def load_best_model(self: Any) -> None:
            best, sharded = self.state.best_model_checkpoint, self.is_fsdp_enabled or self.is_deepspeed_enabled
            found = None if sharded else _adapted(facade, self.model)
            if found is None or best is None or not restore_all(*found, Path(best)):
                theirs(self)

        return load_best_model

    def make_save(theirs: Callable[..., None]) -> Callable[..., None]:
        def save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
            found = _adapted(facade, self.model)
            with _injected_saved(found[0]) if found is not None and not found[1] else nullcontext():
                theirs(self, output_dir, state_dict)

        return save

    def make_policy(theirs: Callable[..., None]) -> Callable[..., None]:
        def update_fsdp_plugin(model: nn.Module, accelerator: Any) -> None:
            if not isinstance(model, facade):  # PEFT's policy knows PEFT's layers
                theirs(model, accelerator)

        return update_fsdp_plugin

    stand_before(module.Trainer, "_load_from_checkpoint", make_resume)
    stand_before(module.Trainer, "_load_best_model", make_best)
    stand_before(module.Trainer, "_save", make_save)
    stand_before(module, "update_fsdp_plugin_peft", make_policy)


def _adapted(facade: type[nn.Module], model: Any) -> tuple[nn.Module, bool] | None:
    """(the model with the adapters, whether a facade has written them), looked for in what may be around it."""
    for one in inwards(model):
        if isinstance(one, facade):
            bare: Any = one
            return (bare.get_base_model(), True) if bare.peft_config else None
        if overlay_of(one) is not None:
            return one, False
    return None


@contextmanager
def _injected_saved(model: nn.Module) -> Iterator[None]:
    """Within the block `save_pretrained` of a model with injected adapters writes the active one, and not the base."""
    guard = vars(model).get(SAVE)
    if not is_guarded(model):
        yield
        return

    def save(folder: str, *, state_dict: Any = None, is_main_process: bool = True) -> None:
        name = sole_active(model, f"Not saved to {folder}")
        if is_main_process or (state_dict is None and is_sharded_model(model)):
            save_adapter(model, name, Path(folder), state=state_dict)

    vars(model)[SAVE] = save
    try:
        yield
    finally:
        vars(model)[SAVE] = guard

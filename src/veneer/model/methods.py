"""What one does with adapters on a model, under PEFT's method names. Knows no files and no tasks."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Generator, nn

from veneer.config import LoraConfig
from veneer.errors import AdapterNameError, VeneerWarning
from veneer.functional.combine import Combination
from veneer.layers.route import as_names
from veneer.model import merge
from veneer.model.apply import activate, add_adapter, check_bases, follow_route, remove_adapter, set_enabled
from veneer.model.batch import serving
from veneer.model.original import merged_original
from veneer.model.overlay import Overlay, overlay_of, own_parameters
from veneer.model.pretrained import note_untied_head, release_saving, with_base_name
from veneer.model.requantization import (
    RequantizationReport,
    check_there_is_something_to_round,
    has_quantised_sites,
    requantization_report,
)
from veneer.model.scale import set_scale
from veneer.model.weighted import add_weighted_adapter


class AdapterMethods(nn.Module):
    """The methods that `PeftModel` and its `base_model` share."""

    @property
    @abstractmethod
    def bare(self) -> nn.Module:
        """The user's own model, with the adapters on it."""

    @property
    def _overlay(self) -> Overlay:
        return overlay_of(self.bare) or Overlay()

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The configs of the adapters, by name."""
        return self._overlay.configs

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act, in order."""
        return list(self._overlay.route.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the adapter that acts, or a list if it is not just one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts: some are active, and they are not disabled."""
        return bool(self._overlay.route.acting)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        generator: Generator | None = None,
    ) -> None:
        """Attach a new adapter; the first one becomes active, later ones wait for `set_adapter`.

        autocast_adapter_dtype  keep it in float32 over a half-precision base
        generator               where its random numbers come from

        low_cpu_mem_usage is there for PEFT's callers; nothing is ever allocated twice.
        Raises AdapterNameError, ConfigError, TargetError or AttachError, and then nothing has changed.
        """
        config = with_base_name(peft_config, self.bare)
        add_adapter(self.bare, adapter_name, config, float32=autocast_adapter_dtype, generator=generator)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        generator: Generator | None = None,
    ) -> None:
        """Attach a new adapter made of others, each with its weight; it waits for `set_adapter`.

        weights           of any sign; each adapter counts with the scale it has now
        combination_type  "cat" is their sum exactly, of the sum of their ranks; "svd" the nearest to it of a given
                          rank; "linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune" mix A with A and B
                          with B, which is cheap and rough; the last four with "_svd" mix the updates B A
        svd_rank          the rank of the types with an SVD; None: on each layer the highest there
        generator         the source of randomness of the types that begin with "dare"

        The other options are described at `Combination`. Only the types with an SVD take DoRA, approximately.
        Raises AdapterNameError, ConfigError, AttachError or MergeError, and then nothing has changed.
        """
        options = Combination(
            combination_type=combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method,
        )
        add_weighted_adapter(self.bare, adapters, weights, adapter_name, options, generator=generator)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let one adapter act, or several in order; the others rest. Merged ones are unmerged first.

        inference_mode  freeze what becomes active

        An adapter that was loaded frozen stays frozen; `set_requires_grad` changes that.
        Raises AdapterNameError, or AttachError if two of them have replaced the same weight (LoftQ).
        """
        names = as_names(adapter_name)
        if not names:
            raise AdapterNameError("set_adapter needs a name; to let none act, use disable_adapter().")
        self._overlay.check_names(names)
        check_bases(self._overlay, names)
        if self._overlay.route.in_weights:
            self.unmerge_adapter()
        if inference_mode:
            self.set_requires_grad(names, False)
        _warn_of_rivals(self._overlay, names)
        activate(self.bare, names)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Let an adapter act `scale` times as strongly as it was trained to (alpha / r); 1 restores it. Not saved.

        Raises AdapterNameError, ArgumentError, or MergeError while adapters are merged.
        """
        set_scale(self.bare, adapter_name, scale)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say whether adapters train while they are active. Raises AdapterNameError.

        For one that rests it holds until the next `set_adapter`, too: a batch may name it (`adapter_names`).
        """
        names = as_names(adapter_names)
        self._overlay.check_names(names)
        for name in names:
            self._overlay.trainable[name] = requires_grad
        follow_route(self.bare, self._overlay)
        if requires_grad:
            self._overlay.route.may_train.update(names)
        for name in names:
            for parameter in own_parameters(self.bare, name):
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first that is left becomes active.

        Raises AdapterNameError, or MergeError while it is merged.
        """
        remove_adapter(self.bare, adapter_name)
        self._tidy()
        left = list(self._overlay.configs)
        if left and not self.active_adapters:
            warnings.warn(f"Adapter {adapter_name!r} was active; now {left[0]!r} is.", VeneerWarning, stacklevel=2)
            activate(self.bare, left[:1])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model, also if adapters are merged or biases were trained."""
        with merge.base_in_place(self.bare):
            yield

    def disable_adapter_layers(self) -> None:
        """Let no adapter act until `enable_adapter_layers`. Merged ones are unmerged."""
        merge.disable(self.bare)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again."""
        set_enabled(self.bare, True)

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, requantize: bool = False
    ) -> None:
        """Fold adapters (the active ones, unless named) into the weights until `unmerge_adapter`.

        requantize  round quantised weights again for it, which loses part of the adapter; a warning says how much

        safe_merge is there for PEFT's callers: every merge checks first that all results are finite.
        Raises AdapterNameError or MergeError, and then nothing has changed.
        """
        losses = self._may_round(requantize)
        merge.merge(self.bare, adapter_names, losses)
        _warn_of_losses(losses)

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit. Raises MergeError if nothing is merged."""
        merge.unmerge(self.bare)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        requantize: bool = False,
    ) -> nn.Module:
        """Fold adapters into the weights for good; returns the plain model, with nothing of Veneer on it.

        requantize  over a quantised base: round the merged weights again, which loses part of the adapter; a warning
                    says how much. Without it the adapters are merged into the base's original, if the folder or hub id
                    it was loaded from is here: that is what is returned, in the dtype of its files, and this model
                    stays as it is

        What it can do is what its own class can: a transformers model has `save_pretrained`, a plain torch model is
        saved with `torch.save(model.state_dict(), file)` or safetensors.

        progressbar and safe_merge are there for PEFT's callers. Raises AdapterNameError or MergeError.
        """
        self._refuse_without_adapters("merge")
        losses = self._may_round(requantize or self._overlay.requantize)
        if losses is None and has_quantised_sites(self.bare):
            return merged_original(self.bare, adapter_names)
        model = merge.merge_and_remove(self.bare, adapter_names, losses)
        self._tidy()
        note_untied_head(model)
        _warn_of_losses(losses)
        return model

    def requantization_report(self, sample: Any = None) -> RequantizationReport:
        """What merging the active adapters into a quantised base would cost; the model stays as it is, bit for bit.

        sample  token ids of shape (rows, tokens), or a mapping of the model's inputs: the report then says how far its
                answers would move, too

        Raises AdapterNameError, MergeError or ArgumentError.
        """
        self._refuse_without_adapters("merge")
        return requantization_report(self.bare, sample)

    def unload(self) -> nn.Module:
        """Take every adapter off; returns the plain model, as it was before the first adapter, still frozen."""
        self._refuse_without_adapters("unload")
        model = merge.remove_all(self.bare)
        self._tidy()
        return model

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own generate, with the active adapters, or with those of each row of the prompts.

        adapter_names  the adapter of each row, `"__base__"` for none; beams and further sequences of a row follow it
        alora_offsets  for adapters with alora_invocation_tokens: how many of its last tokens they act on in each row,
                       None for none; found in the prompt unless given

        Raises AdapterNameError, ArgumentError, AttachError or MergeError, and then nothing was generated.
        """
        own: Callable[..., Any] = self.bare.generate  # type: ignore[assignment]
        with serving(
            self.bare, args, kwargs, adapter_names=adapter_names, alora_offsets=alora_offsets, generating=True
        ):
            return own(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, such that recomputation uses the adapters of forward time."""
        enable: Callable[..., None] = self.bare.activation_checkpointing_enable  # type: ignore[assignment]
        enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def _tidy(self) -> None:
        if overlay_of(self.bare) is None:
            release_saving(self.bare)

    def _may_round(self, requantize: bool) -> merge.Losses | None:
        """Where what rounding costs is put down; None if it is not allowed."""
        if not requantize:
            return None
        self._refuse_without_adapters("merge")
        check_there_is_something_to_round(self.bare)
        return {}

    def _refuse_without_adapters(self, what: str) -> None:
        if not self.peft_config:
            raise AdapterNameError(f"There is nothing to {what}: the model has no adapter.")


def _warn_of_losses(losses: merge.Losses | None) -> None:
    if losses:
        warnings.warn(str(RequantizationReport(losses)), VeneerWarning, stacklevel=3)


def _warn_of_rivals(overlay: Overlay, names: Sequence[str]) -> None:
    """Say whose copy of a module acts, where several of these adapters train it in full."""
    owner = {path: name for name in names for path in overlay.resolutions[name].saved}
    rivals = sorted({name for name in names for path in overlay.resolutions[name].saved if owner[path] != name})
    if rivals:
        paths = sorted(path for path in owner if sum(path in overlay.resolutions[name].saved for name in names) > 1)
        warnings.warn(
            f"{', '.join(paths)} is trained in full (modules_to_save) by several of the adapters that are to act. Of "
            f"these the copy of {owner[paths[0]]!r}, the last one named, acts; that of {', '.join(rivals)} does not.",
            VeneerWarning,
            stacklevel=3,
        )

"""A LoRA out of a model that was trained in full: on each layer the factors nearest to what training changed.

    found = extract_lora(tuned, base, rank=32)
    print(found)              # how much of the change it holds, layer by layer
    found.save("my-lora")     # an adapter folder, for PeftModel.from_pretrained here or in PEFT

Shapes: I in, O out, R rank.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from veneer.config import LoraConfig, TaskType
from veneer.errors import ConfigError, MergeError, VeneerWarning, bullet_list, shortened
from veneer.functional.extract import Extraction, check_rank, difference, extract
from veneer.layers.saved_module import original_state
from veneer.layers.weights import read
from veneer.model.config_for import config_for
from veneer.model.files import write_values
from veneer.model.methods import AdapterMethods
from veneer.model.overlay import overlay_of
from veneer.model.pretrained import with_base_name
from veneer.model.tensors import bias_key, site_keys
from veneer.storage import keys
from veneer.targets import Resolution, Site, resolve
from veneer.targets.names import inside

_One = TypeVar("_One")


@dataclass(frozen=True)
class LayerFit:
    """How well one layer's factors do: ‖D‖ and ‖D - B A‖ / ‖D‖ (Frobenius), D being the change of the weight."""

    path: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class ExtractedLora:
    """A LoRA that is not on a model: its config, its values by their names in an adapter file, and how good it is.

    layers    how well each layer's factors do
    left_out  parameters and buffers that changed too and are no part of it, with ‖D‖
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: tuple[LayerFit, ...]
    left_out: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """‖D - B A‖ / ‖D‖ over all adapted layers: 0 if all of their change is in the LoRA, 1 if nothing is."""
        total = math.hypot(*(fit.norm for fit in self.layers))
        missing = math.hypot(*(fit.norm * fit.error for fit in self.layers))
        return missing / total if total > 0 else 0.0

    def save(self, folder: str | Path) -> None:
        """Write an adapter folder in PEFT's format, in one step. Raises AdapterFileError."""
        write_values(folder, self.config, self.tensors)

    def __str__(self) -> str:
        ranks = sorted({fit.rank for fit in self.layers})
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        lines = [f"LoRA of {span} on {len(self.layers)} layers, relative error {self.error:.3g}"]
        lines += [f"  {fit.error:9.3g}  rank {fit.rank:<5d} {fit.path}" for fit in self.layers]
        if self.left_out:
            lines += [f"left out, though changed (by ‖D‖): {len(self.left_out)}"]
            lines += [f"  {norm:9.3g}  {name}" for name, norm in self.left_out.items()]
        return "\n".join(lines)


def extract_lora(
    tuned: nn.Module,
    base: nn.Module,
    rank: int | float,
    *,
    target_modules: list[str] | str | None = None,
    exclude_modules: list[str] | str | None = None,
    modules_to_save: list[str] | None = None,
    bias: str = "none",
    task_type: TaskType | str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progressbar: bool = False,
) -> ExtractedLora:
    """The LoRA over `base` that comes nearest to `tuned`, the same model after training. Neither is changed.

    rank    an integer: of every layer. A float above 0 and at most 1: on each layer the lowest that holds this fraction
            of the squared singular values of its change (0.9, say)
    target_modules, exclude_modules   which layers, as in LoraConfig; None: every linear layer but the output head
    modules_to_save                   modules to take over in full: norms, embeddings, the head
    bias    "none", or "lora_only" or "all" to take over biases
    dtype   of the factors; None: at least float32
    device  where to compute; None: where each layer of `base` lies

    One layer at a time is in memory beside the two models. Layers that did not change get no adapter. What changed and
    is not in the LoRA is listed in `left_out`, and warned of.

    Raises ConfigError or TargetError for settings or models that do not fit, MergeError if a weight cannot be read or
    `dtype` is too narrow.
    """
    check_rank(rank)
    tuned, base = _plain(tuned, "tuned"), _plain(base, "base")
    wanted = LoraConfig(
        r=1,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        modules_to_save=modules_to_save,
        bias=bias,
        task_type=task_type,
    )
    _check_pair(tuned, base)
    resolution = resolve(base, wanted)
    check_sites(resolution.sites, rank)
    fits, tensors = [], {}
    for site in shown(resolution.sites, progressbar):
        D_OI = _difference(tuned, base, site, device)
        if D_OI.any():
            found = named_errors(site, lambda D=D_OI: extract(D, rank, dtype=dtype))
            fits.append(LayerFit(site.path, found.rank, D_OI.norm().item(), found.error))
            tensors |= factor_tensors(base, site, found)
    if not fits:
        raise ConfigError("No layer that target_modules means has changed: there is no LoRA between the two models.")
    changed = {fit.path for fit in fits}
    resolution = _only(resolution, changed, bias)
    config = config_for(
        base,
        {fit.path: fit.rank for fit in fits},
        saved=resolution.saved,
        modules_to_save=resolution.modules_to_save,
        bias=bias,
        task_type=task_type,
        fan_in_fan_out=any(site.kind.fan_in_fan_out for site in resolution.sites),
        inference_mode=True,
    )
    tensors |= _taken_over(tuned, resolution)
    left_out = _left_out(tuned, base, resolution)
    if left_out:
        _warn_of_rest(left_out)
    return ExtractedLora(with_base_name(config, base), tensors, tuple(fits), left_out)


def _plain(model: nn.Module, which: str) -> nn.Module:
    model = model.bare if isinstance(model, AdapterMethods) else model
    if overlay_of(model) is not None:
        raise ConfigError(
            f"The {which} model has adapters on it. convert_to_lora turns one of them into a LoRA; to count them as "
            "part of the weights, call merge_and_unload() first."
        )
    return model


def _check_pair(tuned: nn.Module, base: nn.Module) -> None:
    """Raise ConfigError unless the two have the same tensors, in memory."""
    if tuned is base:
        raise ConfigError("tuned and base are one object: load the base model a second time.")
    ours, theirs = base.state_dict(), tuned.state_dict()
    problems = [f"{name} is in base only" for name in ours if name not in theirs]
    problems += [f"{name} is in tuned only" for name in theirs if name not in ours]
    problems += [
        f"{name} is {list(theirs[name].shape)} in tuned, {list(ours[name].shape)} in base"
        for name in ours
        if name in theirs and ours[name].shape != theirs[name].shape
    ]
    problems += [f"{name} is not loaded (on the meta device)" for name in ours if ours[name].is_meta]
    problems += [f"{name} of tuned is not loaded (on the meta device)" for name in theirs if theirs[name].is_meta]
    if problems:
        headline = "A difference needs the very model that was tuned, loaded twice:"
        raise ConfigError(bullet_list(headline, shortened(problems)))


def check_sites(sites: Iterable[Site], rank: int | float) -> None:
    """Raise ConfigError naming the layers that cannot have a LoRA of this rank out of a difference of weights."""
    problems = [f"{site.path}: {why}" for site in sites if (why := _why_not(site, rank))]
    if problems:
        headline = f"rank={rank} is not possible on {len(problems)} layer(s); see exclude_modules:"
        raise ConfigError(bullet_list(headline, shortened(problems)))


def _why_not(site: Site, rank: int | float) -> str | None:
    (rows, *_), (_, columns, *_) = site.factors
    if site.by_weight:
        return f"its {site.parameter} is read and never called, which is not available yet"
    if rows != columns:
        return "a grouped convolution, whose LoRA is no difference of weights"
    if isinstance(rank, Integral) and rank > min(site.shape):
        return f"{site.shape[0]} x {site.shape[1]} can have rank {min(site.shape)} at most"
    return None


def _difference(tuned: nn.Module, base: nn.Module, site: Site, device: torch.device | str | None) -> Tensor:
    """What training changed on a layer, as an (O, I) matrix."""
    layers = base.get_submodule(site.path), tuned.get_submodule(site.path)
    W_base, W_tuned = (site.kind.as_used(layer, read(layer, site.parameter)).detach() for layer in layers)
    where = W_base.device if device is None else device
    return site.kind.to_matrix(difference(W_tuned.to(where), W_base.to(where)))


def named_errors(site: Site, compute: Callable[[], Extraction]) -> Extraction:
    """What `compute` answers; its errors name the layer."""
    try:
        return compute()
    except (ConfigError, MergeError) as error:
        raise type(error)(f"{site.path}: {error}") from None


def factor_tensors(model: nn.Module, site: Site, found: Extraction) -> dict[str, Tensor]:
    """The factors in the shapes of the layer's kind, by their names in an adapter file."""
    shapes = site.kind.factors(model.get_submodule(site.path), site.shape, found.rank)
    names = site_keys(site)
    return {
        names["lora_A"]: found.A.reshape(shapes[0]),
        names["lora_B"]: found.B.reshape(shapes[1]),
    }


def shown(sites: Iterable[_One], progressbar: bool) -> Iterable[_One]:
    """The sites, with a bar that shows how far one is."""
    from rich.progress import track

    return track(list(sites), description="Extracting", disable=not progressbar)


def _only(resolution: Resolution, paths: set[str], bias: str) -> Resolution:
    """The resolution of the adapter that has these layers alone."""
    sites = tuple(site for site in resolution.sites if site.path in paths)
    biases = tuple(name for name in resolution.biases if bias == "all" or name.rpartition(".")[0] in paths)
    return replace(resolution, sites=sites, biases=biases)


def _taken_over(tuned: nn.Module, resolution: Resolution) -> dict[str, Tensor]:
    """Copies of what the adapter holds in full, by the names in an adapter file."""
    values = {
        keys.saved(path, name): value
        for path in resolution.saved
        for name, value in original_state(tuned.get_submodule(path)).items()
    }
    values |= {bias_key(resolution, name): tuned.get_parameter(name) for name in resolution.biases}
    return {key: value.detach().clone() for key, value in values.items()}


def _left_out(tuned: nn.Module, base: nn.Module, resolution: Resolution) -> dict[str, float]:
    """‖D‖ of everything that changed and is not in the adapter; a weight of two names is in it under one."""
    covered = {*resolution.biases, *(f"{site.path}.{site.parameter}" for site in resolution.sites)}
    theirs = tuned.state_dict()
    found = {}
    for name, value in base.state_dict().items():
        if name in covered or inside(name, resolution.saved):
            continue
        other, wide = theirs[name].to(value.device), torch.promote_types(theirs[name].dtype, value.dtype)
        if not torch.equal(other.to(wide), value.to(wide)):
            found[name] = (other.double() - value.double()).norm().item()
    return found


def _warn_of_rest(left_out: Mapping[str, float]) -> None:
    names = sorted(left_out, key=lambda name: -left_out[name])
    warnings.warn(
        f"{len(names)} more tensor(s) changed and are not in the LoRA, the most changed first: "
        f"{', '.join(shortened(names))}. To take them over in full, name their "
        "modules in modules_to_save, or set bias='all' for biases.",
        VeneerWarning,
        stacklevel=3,
    )

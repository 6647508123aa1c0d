"""LoRA-GA on a whole model: the mean gradient of each weight. Shapes: I in, O out.

Wang, Yu and Li 2024, https://arxiv.org/abs/2407.05000.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import ConfigError, bullet_list
from veneer.init.mean_gradient import MeanGradient
from veneer.layers.kinds import Layer
from veneer.layers.weights import is_offloaded, stored
from veneer.layers.weights.dense import DENSE
from veneer.model.measure.observe import all_of, bare_model, base_alone, sites_for
from veneer.model.merge import base_in_place
from veneer.model.statistics import keep_statistics
from veneer.storage.measured_file import is_written, read_measured, write_measured
from veneer.targets import Site

_CALL = "preprocess_loraga"
_NAME = "_peft_loraga_grad"  # PEFT's, in its cache files


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | None = None,
) -> None:
    """Measure what init_lora_weights="lora_ga" starts from; call it before `get_peft_model`, with the same config.

    train_step  runs forward and backward, over one batch or several; it is called once, in training mode. Each backward
                pass counts as a batch. It needs no optimizer: weights do not change
    cache_file  a safetensors file: read if it is there, then train_step is not called; written if not

    One gradient at a time is held beside the float32 sums; `requires_grad` and `.grad` are as before afterwards.

    Raises ConfigError if the loss does not depend on a layer, if a weight has no gradient (a quantised one) or the
    config does not fit, AdapterFileError for a file that does not fit, and what attaching would raise.
    """
    model = bare_model(model)
    with base_in_place(model):
        sites = sites_for(model, lora_config, "lora_ga", call=_CALL)
        _refuse_groups(model, sites)
        if cache_file is not None and is_written(cache_file):
            keep_statistics(model, "lora_ga", _read(cache_file, model, sites))
            return
        _refuse_without_gradient(model, sites)
        found = _measured(model, sites, train_step)
        if cache_file is not None:
            _write(cache_file, model, sites, found)
    keep_statistics(model, "lora_ga", found)


def _refuse_groups(model: nn.Module, sites: tuple[Site, ...]) -> None:
    grouped = [site.path for site in sites if site.kind.groups(model.get_submodule(site.path)) > 1]
    if grouped:
        raise ConfigError(
            bullet_list(f"{_CALL} needs weights that are matrices; these are of grouped convolutions:", grouped[:6])
        )


def _refuse_without_gradient(model: nn.Module, sites: tuple[Site, ...]) -> None:
    offloaded = [site.path for site in sites if is_offloaded(model.get_submodule(site.path), site.parameter)]
    if offloaded:
        raise ConfigError(
            bullet_list(
                f"{_CALL} needs gradients of the weights, and these are offloaded. Measure on a model that is "
                "not, with a cache_file, and read that with this one:",
                offloaded[:6],
            )
        )
    quantised = [site.path for site in sites if not DENSE.holds(model.get_submodule(site.path), site.parameter)]
    if quantised:
        raise ConfigError(
            bullet_list(
                f"{_CALL} needs gradients of the weights, and these are quantised. Measure on the model in bfloat16 or "
                "float32, with a cache_file, and read that with the quantised one:",
                quantised[:6],
            )
        )


def _measured(model: nn.Module, sites: tuple[Site, ...], train_step: Callable[[], object]) -> dict[str, Tensor]:
    sums = {site.path: MeanGradient(*site.shape, device=_weight(model, site).device) for site in sites}
    by_weight: dict[nn.Parameter, list[Site]] = {}
    for site in sites:
        by_weight.setdefault(_weight(model, site), []).append(site)

    def take(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        assert isinstance(weight, nn.Parameter)
        for site in by_weight[weight]:
            try:
                sums[site.path].update(site.kind.to_matrix(gradient))
            except ConfigError as error:
                raise ConfigError(f"{site.path}: {error}") from None

    with base_alone(model, training=True), _only_gradients_of(model, by_weight, take), torch.enable_grad():
        train_step()
    return all_of(((path, one.mean) for path, one in sums.items()), f"{_CALL}: train_step was not enough:")


def _weight(model: nn.Module, site: Site) -> nn.Parameter:
    layer: Layer = model.get_submodule(site.path)
    weight = stored(layer, site.parameter)
    assert isinstance(weight, nn.Parameter)
    return weight


@contextmanager
def _only_gradients_of(
    model: nn.Module, weights: dict[nn.Parameter, list[Site]], take: Callable[[Tensor], None]
) -> Iterator[None]:
    """Within the block only these weights get gradients, each given to `take` as soon as it is there."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    handles = []
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in weights)
            parameter.grad = None
        for weight in weights:
            handles.append(weight.register_post_accumulate_grad_hook(take))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (wanted, gradient) in before.items():
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _read(file: str, model: nn.Module, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    names = {site.path: f"{site.path}.{_NAME}" for site in sites}
    shapes = {names[site.path]: _shape(model, site) for site in sites}
    tensors = read_measured(file, shapes, notes={})
    return {site.path: site.kind.to_matrix(tensors[names[site.path]]).float() for site in sites}


def _write(file: str, model: nn.Module, sites: tuple[Site, ...], found: dict[str, Tensor]) -> None:
    tensors = {f"{site.path}.{_NAME}": site.kind.from_matrix(found[site.path], _shape(model, site)) for site in sites}
    write_measured(file, tensors, notes={})


def _shape(model: nn.Module, site: Site) -> tuple[int, ...]:
    """The shape of the weight, in which gradients are kept; of a quantised one, that of its matrix."""
    layer: Layer = model.get_submodule(site.path)
    return tuple(stored(layer, site.parameter).shape) if DENSE.holds(layer, site.parameter) else site.shape

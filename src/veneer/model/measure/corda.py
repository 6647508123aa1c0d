"""CorDA on a whole model: the covariance of each layer's inputs. Shapes: B batch, T tokens, I in, O out, R rank.

Yang et al. 2024, https://arxiv.org/abs/2406.05223.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import CordaConfig, LoraConfig
from veneer.errors import ConfigError
from veneer.init import CordaParts, Measured, Weight
from veneer.init.corda import decomposed
from veneer.init.covariance import Covariance
from veneer.layers.kinds import Layer
from veneer.layers.weights import home, read
from veneer.model.measure.observe import (
    all_of,
    bare_model,
    base_alone,
    input_of,
    refuse_other_kinds,
    sites_for,
    watching,
)
from veneer.model.measure.progress import progress
from veneer.model.merge import base_in_place
from veneer.model.statistics import keep_statistics
from veneer.storage.measured_file import is_written, read_measured, write_measured
from veneer.targets import Site

_CALL = "preprocess_corda"
_PARTS = ("S_WC", "U_WC", "V_WC")  # PEFT's names: S_r, U_r and C⁻¹ V_r


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure what init_lora_weights="corda" starts from; call it before `get_peft_model`, with the same config.

    run_model     runs the model on samples, in whatever batches; it is called once, in evaluation mode, without
                  gradients. Padding counts as any other token: better give samples of one length. 256 samples of 2,048
                  tokens were enough for 4,096 features (the paper)
    hooked_model  the model that run_model runs, with layers of the same names, if it is another one

    `corda_config.covariance_file` and `.cache_file` are safetensors files: read if they are there, then run_model is
    not needed; written if not. An (I, I) matrix is held for each layer until the adapter is made.

    Raises ConfigError if a layer was never run or the config does not fit, AdapterFileError for a file that does not
    fit, and what attaching would raise; then nothing is kept.
    """
    model = bare_model(model)
    with base_in_place(model):
        sites = sites_for(model, lora_config, "corda", call=_CALL)
        refuse_other_kinds(sites, _CALL)
        settings = CordaConfig.of(lora_config.corda_config)
        if settings.cache_file is not None and is_written(settings.cache_file):
            keep_statistics(model, "corda", _read_parts(settings, sites))
            return
        watched = model if hooked_model is None else bare_model(hooked_model)
        found: Mapping[str, Measured] = _covariances(watched, sites, settings, run_model)
        if settings.cache_file is not None:
            found = _decomposed(model, sites, settings, found)
            _write_parts(settings, found)
    keep_statistics(model, "corda", found)


def _covariances(
    watched: nn.Module, sites: tuple[Site, ...], settings: CordaConfig, run_model: Callable[[], object] | None
) -> dict[str, Tensor]:
    file = settings.covariance_file
    if file is not None and is_written(file):
        return read_measured(file, {site.path: (site.shape[1], site.shape[1]) for site in sites}, notes={})
    if run_model is None:
        raise ConfigError(f"{_CALL} needs run_model, a function that runs the model on samples: no file has them yet.")
    found = _measured(watched, sites, settings, run_model)
    if file is not None:
        write_measured(file, found, notes={})
    return found


def _measured(
    watched: nn.Module, sites: tuple[Site, ...], settings: CordaConfig, run_model: Callable[[], object]
) -> dict[str, Tensor]:
    covariances = {}
    for site in sites:
        layer = _layer(watched, site)
        covariances[site.path] = Covariance(
            site.shape[1], float16=settings.use_float16_for_covariance, device=home(layer, site.parameter)
        )
    with base_alone(watched, training=False), progress(settings.verbose, "CorDA: calls of layers seen") as advance:

        def see(path: str, inputs: tuple[Any, ...]) -> None:
            x = input_of(path, inputs)
            try:
                for sample in x if x.dim() > 2 else [x]:  # (B, T, I): B samples; (N, I): one
                    covariances[path].update(sample)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            advance()

        with watching(watched, covariances, see):
            run_model()
    return all_of(((path, one.mean) for path, one in covariances.items()), f"{_CALL}: run_model was not enough:")


def _layer(watched: nn.Module, site: Site) -> Layer:
    try:
        return watched.get_submodule(site.path)
    except AttributeError:
        raise ConfigError(f"hooked_model has no layer {site.path}: its layers must have the model's names.") from None


def _decomposed(
    model: nn.Module, sites: tuple[Site, ...], settings: CordaConfig, covariances: Mapping[str, Any]
) -> dict[str, CordaParts]:
    def parts(site: Site) -> CordaParts:
        layer: Layer = model.get_submodule(site.path)
        W = read(layer, site.parameter)
        weight = Weight(*site.shape, W.device, lambda: site.kind.to_matrix(W))
        full = decomposed(weight, site.rank, covariances[site.path], method=settings.corda_method)
        advance()
        return CordaParts(full.S_R.float(), full.U_OR.float(), full.V_IR.float())

    with progress(settings.verbose, "CorDA: layers decomposed", total=len(sites)) as advance:
        return all_of(((site.path, lambda site=site: parts(site)) for site in sites), f"{_CALL} cannot start:")


def _names(path: str) -> list[str]:
    return [f"{path}.eigens.{part}" for part in _PARTS]


def _read_parts(settings: CordaConfig, sites: tuple[Site, ...]) -> dict[str, CordaParts]:
    assert settings.cache_file is not None
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        (O, I), R = site.shape, site.rank  # noqa: E741
        shapes |= dict(zip(_names(site.path), [(R,), (O, R), (I, R)], strict=True))
    tensors = read_measured(settings.cache_file, shapes, notes={"corda_method": settings.corda_method})
    return {site.path: CordaParts(*(tensors[name] for name in _names(site.path))) for site in sites}


def _write_parts(settings: CordaConfig, found: Mapping[str, Any]) -> None:
    assert settings.cache_file is not None
    tensors = {
        name: tensor
        for path, parts in found.items()
        for name, tensor in zip(_names(path), (parts.S_R, parts.U_OR, parts.V_IR), strict=True)
    }
    write_measured(settings.cache_file, tensors, notes={"corda_method": settings.corda_method})

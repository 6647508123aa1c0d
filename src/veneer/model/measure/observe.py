"""Run a model to look at it: the base alone, in one mode, with hooks that are gone afterwards, whatever happens."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.config.init_names import OPTIONS_FIELD
from veneer.errors import ConfigError, bullet_list
from veneer.layers.kinds.kind import Layer, linear_update
from veneer.model.merge import base_in_place
from veneer.model.methods import AdapterMethods
from veneer.model.plan import plan
from veneer.targets import Site

_PROVISIONAL = "veneer-measuring"  # the adapter that is planned, to find its layers, and not made


def bare_model(model: nn.Module) -> nn.Module:
    """The user's own model, also where a PeftModel is given."""
    return model.bare if isinstance(model, AdapterMethods) else model


def sites_for(model: nn.Module, config: LoraConfig, method: str, *, call: str) -> tuple[Site, ...]:
    """The layers that an adapter with this config would have, all checks made.

    Raises what attaching the adapter would raise, and ConfigError if the config asks for another initialisation or
    if there are fused experts.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{call} needs a LoraConfig, not {type(config).__name__}.")
    if config.init_lora_weights != method:
        raise ConfigError(
            f"{call} measures for init_lora_weights={method!r}, and the config says {config.init_lora_weights!r}: "
            f"use LoraConfig(init_lora_weights={method!r}, {OPTIONS_FIELD[method]}=…)."
        )
    refuse_experts(config, call)
    return plan(model, _PROVISIONAL, config).resolution.sites


def refuse_experts(config: LoraConfig, call: str) -> None:
    """Raise ConfigError if the config adapts parameters that no layer of their own reads."""
    if config.target_parameters:
        raise ConfigError(
            f"{call} cannot measure target_parameters={config.target_parameters!r}: what goes into single experts of a "
            "fused layer cannot be seen. Leave them out, or give them an adapter of their own with another start."
        )


def sees_rows(site: Site) -> bool:
    """Whether the inputs of the layer are rows of its matrix: (…, I), as a linear layer's, not a convolution's."""
    return site.kind.update is linear_update and not site.by_weight and site.tied_to is None


def refuse_other_kinds(sites: Iterable[Site], call: str) -> None:
    """Raise ConfigError naming the layers whose inputs are no rows of their matrix."""
    strange = [f"{site.path}: {site.kind.name}" for site in sites if not sees_rows(site)]
    if strange:
        raise ConfigError(
            bullet_list(f"{call} looks at the inputs of linear layers, and these are others. Leave them out:", strange)
        )


@contextmanager
def base_alone(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Within the block no adapter acts, and all modules train or none does; afterwards modes and buffers are as before.

    Buffers too: batch norm counts every forward pass in training.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    with base_in_place(bare_model(model)):
        nn.Module.train(model, training)  # a PeftModel's own would warn that nothing trains
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers.items():
                    buffer.copy_(before)


@contextmanager
def watching(model: nn.Module, paths: Iterable[str], see: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the block `see(path, inputs)` is called before each call of one of the layers."""
    handles = []
    try:
        for path in paths:
            layer = model.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(partial(_pass_on, see, path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_on(
    see: Callable[[str, tuple[Any, ...]], None], path: str, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    see(path, args or tuple(kwargs.values()))


def input_of(path: str, inputs: tuple[Any, ...]) -> Tensor:
    """The tensor among a layer's inputs. Raises ConfigError if it is not the first."""
    if not inputs or not isinstance(inputs[0], Tensor):
        found = type(inputs[0]).__name__ if inputs else "nothing"
        raise ConfigError(f"{path}: a tensor was expected as the layer's first input, not {found}.")
    return inputs[0].detach()


def all_of(parts: Iterable[tuple[str, Callable[[], Any]]], headline: str) -> dict[str, Any]:
    """{path: what its part answers}. Raises ConfigError that lists every path whose part cannot answer."""
    found, problems = {}, []
    for path, answer in parts:
        try:
            found[path] = answer()
        except ConfigError as error:
            problems.append(f"{path}: {error}")
    if problems:
        shown = problems if len(problems) <= 6 else [*problems[:6], f"… and {len(problems) - 6} more layers"]
        raise ConfigError(bullet_list(headline, shown))
    return found

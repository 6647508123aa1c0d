"""Use trained updates more or less strongly than they were trained to be, asked for by name.

What an adapter file says, and what training goes on from, stays the trained scale.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from veneer.errors import MergeError
from veneer.layers.adapter import checked_factor
from veneer.model.overlay import adapted_part, adapters_by_site, overlay_needed


def set_scale(model: nn.Module, name: str, scale: float) -> None:
    """Scale adapter `name` by `scale` times its trained factor (alpha / r), in every layer; 1 restores it.

    Raises AdapterNameError, ArgumentError, or MergeError while adapters are merged.
    """
    part = adapted_part(model)
    overlay_needed(part).check_names([name])
    factor = checked_factor(scale)
    _refuse_merged(part)
    for _, adapter in adapters_by_site(part, name):
        adapter.rescale(factor * adapter.trained_scale)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block every adapter's update is multiplied by `multiplier`; blocks may be nested.

    Between 0 and 1 this is WiSE-FT, the way from the base to the tuned model (https://arxiv.org/abs/2109.01903).
    Call backward inside the block. Raises AdapterNameError, ArgumentError, or MergeError while adapters are merged.
    """
    part = adapted_part(model)
    factor = checked_factor(multiplier)
    _refuse_merged(part)
    adapters = [adapter for name in overlay_needed(part).configs for _, adapter in adapters_by_site(part, name)]
    outside = [(adapter, float(adapter.scale), adapter.trained_scale) for adapter in adapters]
    try:
        for adapter, scale, _ in outside:
            adapter.rescale(scale * factor)
        yield
    finally:
        for adapter, scale, trained in outside:
            if adapter.trained_scale == trained:  # else another one was swapped in, which has its own
                adapter.rescale(scale)


def _refuse_merged(part: nn.Module) -> None:
    if merged := overlay_needed(part).route.in_weights:
        raise MergeError(f"{', '.join(merged)} is merged, and the scale part of the weights: unmerge it first.")

"""What the adapters of a model are doing: layer by layer, and on the whole. Fields and words are PEFT's."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from veneer.errors import MergeError
from veneer.layers import swap
from veneer.layers.attach import Adapters
from veneer.layers.fast_path import why_plain
from veneer.layers.kinds import Layer
from veneer.layers.route import Route
from veneer.layers.saved_module import Copies
from veneer.layers.token_rows import RowsByAdapter
from veneer.layers.weights import is_quantised, store_of, stored
from veneer.model.methods import AdapterMethods
from veneer.model.overlay import adapted_part, overlay_needed
from veneer.model.report import count_parameters

Irregular = Literal["irregular"]
_Value = TypeVar("_Value")


@dataclass
class TunerLayerStatus:
    """One module with adapters.

    name                  its path in the model
    module_type           "lora." and its class; "ModulesToSaveWrapper" if it is trained in full, and
                          "TrainableTokensLayer" if some of its rows are
    enabled               False while adapters are disabled
    active_adapters       the adapters chosen for the model
    merged_adapters       those that are part of the weights here
    requires_grad         by adapter: whether its parameters here train; "irregular" if some do
    available_adapters    the adapters here
    devices               by adapter: the kinds of device its parameters are on
    quantization_backend  how the weight is quantised, or None
    path                  how it is computed: "fast", or "plain: " and why the fast path does not fit; "" for a module
                          that is trained in full. PEFT has no such field
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None
    path: str


@dataclass
class TunerModelStatus:
    """The whole model; "irregular" where its layers differ.

    base_model_type     the class of the user's model
    adapter_model_type  "LoraModel", or "None" for a model adapted in place
    peft_types          "LORA" for each adapter
    trainable_params, total_params, num_adapter_layers  counts
    paths               {path: how many layers are computed so}. PEFT has no such field

    The other fields are those of a layer, summed up.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None | Irregular
    paths: dict[str, int]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """What each adapted module of a model does, in the model's order.

    model  a PeftModel or LoraModel, where paths begin with `model.`, or a model adapted in place

    Raises AdapterNameError (a ValueError) if the model has no adapter.
    """
    part = adapted_part(model)
    prefix = "model." if isinstance(model, AdapterMethods) else _path_of(part, model)
    return [
        _layer_status(part, f"{prefix}{path}", module, child)
        for path, module in part.named_modules()
        if isinstance(module, swap.Front)
        for child in module.children()
        if isinstance(child, Adapters | Copies | RowsByAdapter)
    ]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """What the adapters of a model do on the whole. Raises AdapterNameError (a ValueError) if it has none."""
    part, layers = adapted_part(model), get_layer_status(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    trainable, total = count_parameters(model)
    flags = {name: [own for layer in layers if (own := layer.requires_grad.get(name)) is not None] for name in names}
    trains: dict[str, bool | Irregular] = {name: _flag(mine) for name, mine in flags.items() if mine}
    return TunerModelStatus(
        base_model_type=swap.base_class(part).__name__,
        adapter_model_type="LoraModel" if isinstance(model, AdapterMethods) else "None",
        peft_types={name: config.peft_type for name, config in overlay_needed(part).configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_agreed(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad=trains,
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, [])}) for name in names
        },
        quantization_backend=_agreed(layer.quantization_backend for layer in layers),
        paths=dict(Counter(layer.path for layer in layers if layer.path)),
    )


def _layer_status(part: nn.Module, name: str, module: nn.Module, child: nn.ModuleDict) -> TunerLayerStatus:
    route = overlay_needed(part).route
    parameters = {adapter: [*own.parameters()] or [*own.buffers()] for adapter, own in child.items()}
    trains: dict[str, bool | Irregular] = {
        adapter: _flag([p.requires_grad for p in mine]) for adapter, mine in parameters.items() if mine
    }
    return TunerLayerStatus(
        name=name,
        module_type=_type(module, child),
        enabled=route.enabled,
        active_adapters=list(route.active),
        merged_adapters=_in_weights(module, route, parameters),
        requires_grad=trains,
        available_adapters=sorted(parameters),
        devices={adapter: sorted({p.device.type for p in mine}) for adapter, mine in parameters.items()},
        quantization_backend=_backend(module) if isinstance(child, Adapters) else None,
        path=_path(module, route) if isinstance(child, Adapters) else "",
    )


def _path(layer: Layer, route: Route) -> str:
    """How a layer is computed in a pass in which the acting adapters serve the whole batch."""
    here = [name for name in route.acting or sorted(layer.adapters.keys()) if name in layer.adapters]
    if len(here) > 1 and route.acting:
        return f"plain: {len(here)} adapters act at once"
    reason = why_plain(layer, layer.adapters[here[0]]) if here else None
    return "fast" if reason is None else f"plain: {reason}"


def _in_weights(module: Layer, route: Route, names: Iterable[str]) -> list[str]:
    here = module._veneer_merged
    return [name for name in (*route.merged, *(() if here is None else here.names)) if name in names]


def _type(module: nn.Module, child: nn.Module) -> str:
    if isinstance(child, Adapters):
        return f"lora.{swap.base_class(module).__name__}"
    return "ModulesToSaveWrapper" if isinstance(child, Copies) else "TrainableTokensLayer"


def _path_of(part: nn.Module, model: nn.Module) -> str:
    path = next(path for path, module in model.named_modules() if module is part)
    return f"{path}." if path else ""


def _backend(layer: nn.Module) -> str | None:
    """The name of the store that keeps the weight, or of the weight's own class; None for plain numbers."""
    if "weight" not in layer._parameters and not is_quantised(layer):
        return None
    try:
        name = store_of(layer).name
    except MergeError:
        weight = stored(layer)
        return None if type(weight) is nn.Parameter and weight.is_floating_point() else type(weight).__name__
    return None if name in ("dense", "offloaded") else name


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """The adapters that are merged wherever they are; "irregular" if one is merged in some layers only."""
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    return "irregular" if partly else sorted(merged)


def _flag(values: Sequence[bool | str]) -> bool | Irregular:
    """True or False if all are, else "irregular"."""
    if all(value is True for value in values):
        return True
    return False if all(value is False for value in values) else "irregular"


def _agreed(values: Iterable[_Value]) -> _Value | Irregular:
    """The one value that all are, or "irregular"."""
    first, *others = values
    return first if all(value == first for value in others) else "irregular"

"""The dtypes of a model's parameters before and during training."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import AttachError, ConfigError, VeneerWarning
from veneer.layers.weights import is_quantised, keep_order, store_of
from veneer.model.methods import AdapterMethods
from veneer.model.overlay import check_model, overlay_of
from veneer.model.report import PACKED

_HALF = (torch.float16, torch.bfloat16)
# methods that need the dtypes their model was loaded with
_KEEPS_HALF = ("gptq", "aqlm", "awq", "eetq", "hqq", "torchao", "quanto")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a quantised transformers model ready for an adapter (QLoRA, https://arxiv.org/abs/2305.14314); returns it.

    All parameters are frozen. Those in float16 or bfloat16 that are not quantised (norms, embeddings) become float32,
    unless the model was quantised by GPTQ, AQLM, AWQ, EETQ, HQQ, torchao or quanto, whose layers compute in one dtype.
    Then gradient checkpointing is switched on and, where it is the reentrant kind, gradients for the inputs.

    auto_clear_cache  give the memory of the half-precision copies back to the accelerator

    Call it before the adapter is attached: AttachError otherwise. Warns if the model is not quantised.
    """
    check_model(model)
    if isinstance(model, AdapterMethods) or any(overlay_of(module) is not None for module in model.modules()):
        raise AttachError("The model has adapters already, which would be frozen: prepare it before attaching them.")
    method = _quantisation(model)
    model.requires_grad_(False)
    for module in model.modules():
        keep_order(module)
    if method not in _KEEPS_HALF:
        for parameter in model.parameters():
            if parameter.dtype in _HALF and _is_plain(parameter):
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if method is None:
        warnings.warn(
            "The model is not quantised: it is frozen and in float32 now, and gradient checkpointing was left alone.",
            VeneerWarning,
            stacklevel=2,
        )
    elif use_gradient_checkpointing:
        _switch_on_checkpointing(model, gradient_checkpointing_kwargs or {})
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters to `dtype` (float16 or bfloat16), trainable ones to float32, as autocast training wants them.

    Quantised weights, which are integers or packed, stay as they are. Raises ConfigError for another dtype.
    """
    if dtype not in (*_HALF, torch.float32):
        raise ConfigError(f"dtype={dtype}: must be torch.float16, torch.bfloat16 or torch.float32.")
    check_model(model)
    for parameter in model.parameters():
        if _is_plain(parameter):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _is_plain(parameter: Tensor) -> bool:
    return (
        parameter.dtype.is_floating_point
        and parameter.dtype.itemsize > 1
        and type(parameter).__name__ not in PACKED
        and type(parameter.data) is Tensor
    )


def _quantisation(model: Any) -> str | None:
    """How transformers says that a model is quantised, or by whose weights it is; None if it is not."""
    method = getattr(model, "quantization_method", None)
    if method in _KEEPS_HALF:
        return str(getattr(method, "value", method))
    if getattr(model, "hqq_quantized", False):
        return "hqq"
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        return "bitsandbytes"
    return next((store_of(module).name for module in model.modules() if is_quantised(module)), None)


def _switch_on_checkpointing(model: Any, options: dict[str, Any]) -> None:
    if options.get("use_reentrant", True):
        # the reentrant kind gives no gradients unless an input asks for them, and everything below is frozen
        model.enable_input_require_grads()
    newer = getattr(model, "activation_checkpointing_enable", None)
    enable = model.gradient_checkpointing_enable if newer is None else newer
    enable(options) if options else enable()

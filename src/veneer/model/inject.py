"""An adapter on a model in place, without a facade around it."""

import re
import warnings
from collections.abc import Container, Mapping

from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import AttachError, ConfigError, TargetError, VeneerWarning, bullet_list, check_kind, shortened
from veneer.model.apply import activate, add_adapter, one_at_a_time
from veneer.model.facade import PeftModel
from veneer.model.methods import AdapterMethods
from veneer.model.overlay import DEFAULT, check_model
from veneer.model.pretrained import guard_saving, with_base_name
from veneer.model.teach_trainer import teach_trainer
from veneer.storage import keys
from veneer.targets import resolve

_FACTOR = ".lora_"
_OF_A_PROCESSOR = re.compile(r"(?P<attention>.+)\.processor\.(?P<layer>\w+)_lora\.(down|up)\.weight")
# What else narrows target_modules down: said once by the paths that a state dict names.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


@one_at_a_time
def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = DEFAULT,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Freeze a model and lay a new trainable adapter over it, in place; returns the same model.

    state_dict         the names in it, not the values, say which layers are adapted, whatever target_modules says
    low_cpu_mem_usage  is there for PEFT's callers; nothing is ever allocated twice

    The new adapter acts, also where others were there before. `LoraModel(model)` has the methods for what is then on
    it; `get_peft_model_state_dict` its values.

    Raises ConfigError, TargetError, AdapterNameError or AttachError, and then the model is as it was.
    """
    if isinstance(model, AdapterMethods):
        raise AttachError(f"{type(model).__name__} is a facade over a model already: call its add_adapter.")
    if not isinstance(peft_config, LoraConfig):
        raise ConfigError(f"peft_config must be a LoraConfig, not {type(peft_config).__name__}.")
    check_model(model)
    inner = model._modules.get("_orig_mod") or model  # of what torch.compile returned
    if state_dict is not None:
        peft_config = _config_from_keys(peft_config, inner, state_dict)
    add_adapter(inner, adapter_name, with_base_name(peft_config, inner))
    activate(inner, (adapter_name,))
    guard_saving(inner)
    teach_trainer(PeftModel)
    return model


def _layer_meant(key: str, paths: Container[str]) -> str:
    """A key of alpha_pattern, put right where diffusers gives it the name that an attention's factors once had.

    Of sd-scripts' files it makes `….attn1.processor.to_k_lora.down.weight`, which is the layer `….attn1.to_k`.
    """
    if (found := _OF_A_PROCESSOR.fullmatch(key)) is None:
        return key
    layer = f"{found['attention']}.{found['layer']}"
    return next((f"^{re.escape(path)}" for path in (layer, f"{layer}.0") if path in paths), key)


def _config_from_keys(config: LoraConfig, model: nn.Module, state: Mapping[str, Tensor]) -> LoraConfig:
    """The config with the layers that the keys of an adapter's state dict name as its targets."""
    check_kind(state, Mapping, "A state dict ({name: tensor})")
    if config.target_parameters:
        raise ConfigError("target_parameters: the keys of a state dict do not name parameters; leave state_dict out.")
    plain = [key.removeprefix("_orig_mod.").removeprefix(keys.PREFIX) for key in state]
    paths = sorted({key.rpartition(_FACTOR)[0] for key in plain if _FACTOR in key})
    modules = dict(model.named_modules())
    if not paths:
        raise TargetError("No key of state_dict names a layer with a factor (….lora_A.weight and so on).")
    if unknown := [path for path in paths if path not in modules]:
        raise TargetError(bullet_list("state_dict names layers that the model does not have:", shortened(unknown)))
    config = config.changed(alpha_pattern={_layer_meant(key, modules): x for key, x in config.alpha_pattern.items()})
    named = config.changed(target_modules=paths, **dict.fromkeys(_NARROWING))
    found = {site.path for site in resolve(model, named, strict=False).sites}
    if found != set(paths):
        raise TargetError(f"The names in state_dict also mean {', '.join(sorted(found - set(paths))[:3])}.")
    try:
        with warnings.catch_warnings(action="ignore", category=VeneerWarning):
            meant = {site.path for site in resolve(model, config, strict=False).sites}
    except TargetError:
        meant = set()
    if meant != found:
        warnings.warn(
            f"target_modules means {len(meant)} layers and state_dict names {len(found)}; {len(meant & found)} are the "
            "same. Those that state_dict names are adapted.",
            VeneerWarning,
            stacklevel=4,
        )
    return named

"""Every public function told what it cannot use says so itself, and what it needs."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import veneer
from veneer import LoraConfig, get_peft_model
from veneer.errors import VeneerError

CONFIG = LoraConfig(r=2, target_modules=["0"])
KEY = "base_model.model.0.lora_A.weight"


def adapted() -> veneer.PeftModel:
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), CONFIG)


ON_A_MODEL: dict[str, Callable] = {
    "get_peft_model": lambda m: veneer.get_peft_model(m, CONFIG),
    "PeftModel": lambda m: veneer.PeftModel(m, CONFIG),
    "from_pretrained": lambda m: veneer.PeftModel.from_pretrained(m, "nowhere"),
    "inject": lambda m: veneer.inject_adapter_in_model(CONFIG, m),
    "cast": lambda m: veneer.cast_mixed_precision_params(m, torch.float16),
    "kbit": veneer.prepare_model_for_kbit_training,
    "convert": lambda m: veneer.convert_to_lora(m, 2),
    "extract": lambda m: veneer.extract_lora(m, m, 2),
    "lorafa": lambda m: veneer.create_lorafa_optimizer(m, 2, 4, 1e-3),
    "loraplus": lambda m: veneer.create_loraplus_optimizer(m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16),
    "layer_status": veneer.get_layer_status,
    "model_status": veneer.get_model_status,
    "get_state": veneer.get_peft_model_state_dict,
    "set_state": lambda m: veneer.set_peft_model_state_dict(m, {}),
    "get_base": veneer.get_base_model_state_dict,
    "set_base": lambda m: veneer.set_base_model_state_dict(m, {}),
    "hotswap_state": lambda m: veneer.hotswap_adapter_from_state_dict(m, {}, "default", CONFIG),
    "prepare_hotswap": veneer.prepare_model_for_compiled_hotswap,
    "rescale": lambda m: veneer.rescale_adapter_scale(m, 2.0).__enter__(),
}
WITH_A_VALUE: dict[str, Callable] = {
    "from_pretrained": lambda v: veneer.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), v),
    "config": veneer.PeftConfig.from_pretrained,
    "weights": veneer.load_peft_weights,
    "load": lambda v: adapted().load_adapter(v, "other"),
    "hotswap": lambda v: veneer.hotswap_adapter(adapted(), v, "default"),
    "save": lambda v: adapted().save_pretrained(v),
    "save_as": lambda v: veneer.save_as_lora(v, adapted(), 2),
    "set_adapter": lambda v: adapted().set_adapter(v),
    "requires_grad": lambda v: adapted().set_requires_grad([v], True),
    "delete": lambda v: adapted().delete_adapter(v),
    "merge": lambda v: adapted().merge_adapter([v]),
    "set_scale": lambda v: adapted().set_scale(v, 1.0),
    "selected": lambda v: adapted().save_pretrained("nowhere", selected_adapters=[v]),
    "state": lambda v: veneer.set_peft_model_state_dict(adapted(), v),
    "state_value": lambda v: veneer.set_peft_model_state_dict(adapted(), {KEY: v}),
    "base_state": lambda v: veneer.set_base_model_state_dict(adapted(), v),
    "hotswap_state": lambda v: veneer.hotswap_adapter_from_state_dict(adapted(), v, "default", CONFIG),
    "name": lambda v: veneer.get_peft_model_state_dict(adapted(), adapter_name=v),
    "optimizer": lambda v: veneer.create_loraplus_optimizer(adapted(), v, lr=1e-3, loraplus_lr_ratio=16),
    "class": lambda v: veneer.register_kind(v, None),
    "kind": lambda v: veneer.register_kind(nn.Bilinear, v),
}


@pytest.mark.parametrize("call", ON_A_MODEL.values(), ids=ON_A_MODEL)
@pytest.mark.parametrize("value", [None, "text", 5, []], ids=repr)
def test_what_is_no_model(call: Callable, value: object) -> None:
    with pytest.raises(VeneerError, match=r"A model \(a torch.nn.Module\) is needed, not"):
        call(value)


@pytest.mark.parametrize("call", WITH_A_VALUE.values(), ids=WITH_A_VALUE)
@pytest.mark.parametrize("value", [None, 5, [], nn.Linear(2, 2)], ids=lambda value: type(value).__name__)
def test_what_is_no_name_no_place_and_no_values(call: Callable, value: object) -> None:
    with pytest.raises(VeneerError):
        call(value)


def test_one_name_where_several_may_stand_is_one_name() -> None:
    model = adapted()
    model.merge_adapter("default")
    model.unmerge_adapter()
    with pytest.raises(VeneerError, match="There is no adapter 'defalt'"):
        model.merge_adapter("defalt")


def test_without_an_adapter_there_is_no_active_config() -> None:
    model = adapted()
    model.merge_and_unload()
    with pytest.raises(VeneerError, match="No adapter is active"):
        _ = model.active_peft_config

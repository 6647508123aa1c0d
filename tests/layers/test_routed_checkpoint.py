"""Gradient checkpointing recomputes with the adapters of forward time."""

import pytest
import torch

import tiny
import veneer
from veneer.layers.routed_checkpoint import RoutedCheckpoint


def checkpointed(reentrant: bool) -> veneer.PeftModel:
    fields = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**fields))
    model.add_adapter("other", veneer.LoraConfig(**fields))
    for name in ("other", "default"):
        model.set_adapter(name)
        tiny.shake(model, seed=len(name))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def gradients(model: veneer.PeftModel, *, switch: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.set_adapter("default")
    loss = model(tiny.ids()).logits.square().mean()
    if switch:
        model.set_adapter("other")
        model.set_requires_grad("default", True)
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.requires_grad_(True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if ".default." in n}


@pytest.mark.parametrize("reentrant", [False, True])
def test_switching_between_forward_and_backward_does_not_change_gradients(reentrant):
    model = checkpointed(reentrant)
    expected = gradients(model, switch=False)
    assert any(g.abs().max() > 0 for g in expected.values())
    found = gradients(model, switch=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_checkpointing_switched_on_on_the_bare_model_is_protected_too():
    expected = checkpointed(False)
    found = checkpointed(False)
    found.get_base_model().activation_checkpointing_disable()
    found.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    want, have = gradients(expected, switch=False), gradients(found, switch=True)
    for name, gradient in want.items():
        torch.testing.assert_close(have[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_checkpointing_that_was_on_before_attaching_is_protected_too():
    base = tiny.llama()
    base.activation_checkpointing_enable({"use_reentrant": False})
    model = veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["q_proj"]))
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert all(isinstance(f, RoutedCheckpoint) for f in functions if f is not None)
    assert any(functions)
    assert "_set_gradient_checkpointing" in vars(base)
    plain = model.unload()
    assert "_set_gradient_checkpointing" not in vars(plain)
    functions = [vars(m).get("_gradient_checkpointing_func") for m in plain.modules()]
    assert not any(isinstance(f, RoutedCheckpoint) for f in functions)

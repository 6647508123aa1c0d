"""LoRA-FA: PEFT's steps where PEFT is right, and the formula in float64 elsewhere."""

import copy
import dataclasses
import math
from typing import Any

import peft.optimizers.lorafa
import pytest
import torch
from torch import nn

import tiny
import veneer
from optimizers.steps import assert_same_adapter, loss_of, made_alike, ours_on_disk, run
from veneer import LoraConfig, create_lorafa_optimizer, get_peft_model
from veneer.errors import AdapterNameError, ConfigError
from veneer.optimizers.lorafa import LoraFAOptimizer, gram_inverse

LLAMA = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
STACK = {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
CASES = [
    pytest.param(tiny.llama, LLAMA, id="llama"),
    pytest.param(tiny.llama, {**LLAMA, "use_rslora": True}, id="rslora"),
    pytest.param(
        tiny.llama, {**LLAMA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1}}, id="patterns"
    ),
    pytest.param(tiny.Stack, STACK, id="saved"),
]


@pytest.fixture
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT multiplies by the inverse in bfloat16 wherever the machine has it, a CPU too."""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)


def stack(**fields: Any) -> veneer.PeftModel:
    """A small model with an adapter whose B is not zero, so that a step has something to move."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.Stack(), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["first"], **fields}))
    return tiny.shake(model).eval()


def lorafa(model: nn.Module, **said: Any) -> LoraFAOptimizer:
    return create_lorafa_optimizer(model, **{"r": 4, "lora_alpha": 6, "lr": 0.01, **said})


def factors(model: veneer.PeftModel, layer: str = "first", name: str = "default") -> Any:
    return model.get_base_model().get_submodule(layer).adapters[name]


@pytest.mark.usefixtures("in_full_precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("base", "fields"), CASES)
def test_the_steps_are_pefts(base, fields, weight_decay, dtype, tmp_path):
    theirs, ours = made_alike(base().to(dtype), tmp_path, **fields)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    said = {"r": 4, "lora_alpha": 6, "lr": 0.01, "weight_decay": 0.0 if base is tiny.Stack else weight_decay}
    made = peft.optimizers.lorafa.create_lorafa_optimizer(theirs, **said), create_lorafa_optimizer(ours, **said)
    losses = [run(model, optimizer, 5) for model, optimizer in zip((theirs, ours), made, strict=True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6 if dtype == torch.float64 else 1e-5)
    assert losses[1][-1] < losses[1][0]
    assert_same_adapter(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float64 else 1e-5)


def test_the_update_is_the_nearest_to_the_gradient_of_the_weight():
    """s·δB·A, δB the projected gradient, is the full gradient's projection onto the rows of A."""
    model = stack(use_rslora=True).double()
    adapter = factors(model)
    made = lorafa(model)
    loss_of(model).backward()
    layer = model.get_base_model().first
    W = (layer.weight + adapter.scale * adapter.lora_B @ adapter.lora_A).detach().requires_grad_()
    plain = tiny.Stack().double()
    x = nn.functional.linear(plain.tokens(tiny.ids(20)), W, plain.first.bias)
    plain.head(torch.tanh(plain.second(plain.norm(torch.tanh(x))))).square().mean().backward()
    (B,), (gradient,) = made._projected(0, made.param_groups[0])
    assert B is adapter.lora_B
    onto_rows = torch.linalg.pinv(adapter.lora_A) @ adapter.lora_A
    torch.testing.assert_close(adapter.scale * gradient @ adapter.lora_A, W.grad @ onto_rows)


def test_one_step_is_the_formula():
    model = stack().double()
    adapter = factors(model)
    made = lorafa(model, lr=0.1, weight_decay=0.2)
    loss_of(model).backward()
    A, B, scale = adapter.lora_A.detach(), adapter.lora_B.detach().clone(), adapter.scale
    g = adapter.lora_B.grad @ torch.linalg.inv(A @ A.T) / scale**2
    made.step()
    eps = 1e-6 / math.sqrt(1 - 0.999)
    expected = (B - 0.1 * g / (g.abs() + eps)) * (1 - 0.1 * 0.2)
    torch.testing.assert_close(adapter.lora_B.detach(), expected)
    assert torch.equal(adapter.lora_A, A)


@pytest.mark.parametrize("own", ["use_dora", "lora_bias"])
def test_what_lies_beside_the_factors_takes_adamws_steps(own):
    """Against torch's own AdamW; ε is 0, as the two place it apart."""
    fields = {own: True, "bias": "all", "modules_to_save": ["head"]}
    one, other = stack(**fields), stack(**fields)
    made = lorafa(one)
    beside = {name: p for name, p in other.named_parameters() if p.requires_grad and not name.endswith(("_A", "_B"))}
    assert len(beside) == 5  # the adapter's own, two biases (first, norm) and the head's own two
    reference = torch.optim.AdamW(beside.values(), eps=0, weight_decay=0, lr=0.01)
    for group in made.param_groups:
        group["eps"] = 0
    found = dict(one.named_parameters())
    for _ in range(3):
        made.zero_grad()
        loss_of(one).backward()
        for name, parameter in beside.items():
            parameter.grad = found[name].grad.clone()
        made.step()
        reference.step()
    before = dict(stack(**fields).named_parameters())
    for name, parameter in beside.items():
        torch.testing.assert_close(found[name], parameter)
        assert not torch.equal(parameter, before[name])


def test_biases_and_norms_do_not_decay():
    model = stack(bias="all", modules_to_save=["head", "norm"])
    names = {id(p): name.removeprefix("base_model.model.") for name, p in model.named_parameters()}
    groups = lorafa(model, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert {names[id(p)] for p in groups[1]["params"]} == {"head.modules_to_save.default.weight"}
    assert {names[id(p)] for p in groups[2]["params"]} == {
        "first.bias",
        "head.modules_to_save.default.bias",
        "norm.modules_to_save.default.weight",
        "norm.modules_to_save.default.bias",
    }


def test_A_is_frozen_and_nothing_else():
    model = stack(use_dora=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    lorafa(model)
    assert trained - {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in trained if name.endswith("lora_A")
    }
    lorafa(model)  # again, over the A that are frozen already


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_restored_state_goes_on_exactly(dtype, tmp_path):
    fields = {"target_modules": ["first", "second"], "use_dora": True, "modules_to_save": ["head"]}
    whole = stack(**fields).to(dtype)
    made = lorafa(whole, weight_decay=0.1)
    run(whole, made, 2)
    torch.save({"model": whole.state_dict(), "optimizer": made.state_dict()}, tmp_path / "checkpoint.pt")
    run(whole, made, 2)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = stack(**fields).to(dtype)
    again = lorafa(resumed, weight_decay=0.5)
    run(resumed, again, 1)  # its inverses are those of another A, its moments those of another run
    tiny.shake(resumed, seed=9)
    resumed.load_state_dict(kept["model"])
    again.load_state_dict(kept["optimizer"])
    assert again.param_groups[0]["weight_decay"] == 0.1
    run(resumed, again, 2)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert all(isinstance(key, torch.Tensor) for key in again.state)


def test_the_scales_are_the_models_and_not_the_checkpoints():
    made, other = lorafa(stack()), lorafa(stack(lora_alpha=12), lora_alpha=12)
    other.load_state_dict(made.state_dict())
    assert other.param_groups[0]["scales"] == [3.0]


def test_a_copy_of_model_and_optimizer_goes_on_alike():
    model = stack()
    made = lorafa(model)
    run(model, made, 1)
    twin, twins = copy.deepcopy((model, made))
    for one, optimizer in ((model, made), (twin, twins)):
        run(one, optimizer, 2)
    assert torch.equal(factors(twin).lora_B, factors(model).lora_B)


def test_half_precision_keeps_its_moments_in_float32():
    exact, half = stack(), stack()
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    half = half.to(torch.bfloat16)
    made = lorafa(half)
    reference = lorafa(exact)
    for _ in range(20):
        for model in (exact, half):
            factors(model).lora_B.grad = torch.full_like(factors(model).lora_B, 0.5)
        made.step()
        reference.step()
    state = made.state[factors(half).lora_B]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(state["exp_avg_sq"], reference.state[factors(exact).lora_B]["exp_avg_sq"])
    assert factors(half).lora_B.dtype == torch.bfloat16


def test_an_A_that_changes_is_noticed():
    """As when an adapter's values are loaded after the optimizer was made."""
    models = stack(), stack()
    with torch.no_grad():
        factors(models[1]).lora_A.mul_(3)
    made = [lorafa(model) for model in models]
    loss_of(models[0]).backward()
    made[0].step()
    made[0].zero_grad()
    made[0].state.clear()
    models[0].load_state_dict(models[1].state_dict())
    for model, optimizer in zip(models, made, strict=True):
        run(model, optimizer, 1)
    assert torch.equal(factors(models[0]).lora_B, factors(models[1]).lora_B)


def test_an_A_that_was_set_to_train_again_stays_as_it_is():
    model = stack()
    model.add_adapter("other", LoraConfig(target_modules=["second"]))
    made = lorafa(model)
    A = factors(model).lora_A.detach().clone()
    run(model, made, 1)
    model.set_adapter("other")
    model.set_adapter("default")
    assert factors(model).lora_A.requires_grad
    before = factors(model).lora_B.detach().clone()
    run(model, made, 1)
    assert not factors(model).lora_A.requires_grad
    assert factors(model).lora_A.grad is None
    assert torch.equal(factors(model).lora_A, A)
    assert not torch.equal(factors(model).lora_B, before)


def test_a_factor_without_a_gradient_waits():
    model = stack(target_modules=["first", "second", "head"])
    made = lorafa(model)
    with torch.no_grad():
        before = ours_on_disk(model)
    loss_of(model).backward()
    factors(model, "second").lora_B.grad = None
    made.step()
    after = ours_on_disk(model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {f"base_model.model.{layer}.lora_B.weight" for layer in ("first", "head")}
    assert factors(model, "second").lora_B not in made.state


def test_a_factor_of_deficient_rank_is_used_as_far_as_it_goes():
    """Two rows alike: neither NaN nor an explosion, and the step of an adapter that has the row once."""
    model = stack().double()
    adapter = factors(model)
    with torch.no_grad():
        adapter.lora_A[1] = adapter.lora_A[0]
    made = lorafa(model)
    loss_of(model).backward()
    full_gradient_onto_rows = adapter.lora_B.grad @ torch.linalg.pinv(adapter.lora_A @ adapter.lora_A.T)
    _, (gradient,) = made._projected(0, made.param_groups[0])
    torch.testing.assert_close(gradient, full_gradient_onto_rows / adapter.scale**2)
    torch.testing.assert_close(gradient[:, 0], gradient[:, 1])


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_rounding_errors_are_not_blown_up(noise):
    A = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    A[1] = A[0] * (1 + noise)
    inverse = gram_inverse(A)
    assert inverse.isfinite().all()
    assert inverse.abs().max() < 1
    assert torch.equal(gram_inverse(torch.zeros(4, 64)), torch.zeros(4, 4, dtype=torch.float64))


def test_factors_of_a_convolution_are_matrices():
    generator = torch.Generator().manual_seed(0)
    A, B, gradient = (torch.randn(*shape, generator=generator) for shape in ((4, 6, 3, 3), (8, 4, 1, 1), (8, 4, 1, 1)))
    deep = [nn.Parameter(A), nn.Parameter(B.clone())]
    flat = [nn.Parameter(A.flatten(1)), nn.Parameter(B.flatten(1).clone())]
    for _, of_B in (deep, flat):
        of_B.grad = gradient.view_as(of_B).clone()
    for pair in (deep, flat):
        LoraFAOptimizer([{"params": pair, "scales": [2.0]}], lr=0.1).step()
    assert torch.equal(deep[1].flatten(1), flat[1])
    assert not torch.equal(deep[1], B)


def test_an_update_that_is_no_product_is_refused():
    model = stack()
    adapter = factors(model)
    adapter.kind = dataclasses.replace(adapter.kind, name="experts", delta=lambda A, B, scale, shape: B @ A * scale)
    with pytest.raises(
        ConfigError, match=r"those of 1 adapters are made otherwise\.\n  .*first\..*default \(experts\)"
    ):
        lorafa(model)
    assert adapter.lora_A.requires_grad


def test_an_A_of_zeros_is_an_error_that_names_the_layer():
    model = get_peft_model(tiny.Stack(), LoraConfig(r=4, lora_alpha=6, target_modules=["first", "tokens"]))
    with pytest.raises(
        ConfigError, match=r"1 of 2 adapters have an A of zeros.*\n  .*tokens\.adapters\.default\n.*leave"
    ):
        lorafa(model)
    assert factors(model).lora_A.requires_grad
    made = lorafa(tiny.shake(model))
    losses = run(model, made, 4)
    assert losses[-1] < losses[0]


def test_a_closure_is_called_with_gradients():
    model = stack()
    made = lorafa(model)

    def closure() -> float:
        made.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    losses = [made.step(closure) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_autocast_does_not_reach_the_step():
    models = stack(), stack()
    made = [lorafa(model) for model in models]
    for model in models:
        loss_of(model).backward()
    made[0].step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made[1].step()
    assert torch.equal(factors(models[0]).lora_B, factors(models[1]).lora_B)


def test_a_schedule_changes_the_learning_rate():
    model = stack()
    made = lorafa(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.0 if step else 1.0)
    run(model, made, 1, schedule.step)
    before = factors(model).lora_B.detach().clone()
    run(model, made, 1)
    assert torch.equal(factors(model).lora_B, before)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"r": 8}, "r=8 was said, and adapter 'default' has r=4"),
        ({"lora_alpha": 16}, "lora_alpha=16 was said, and adapter 'default' has lora_alpha=6"),
        ({"use_rslora": True}, "use_rslora=True was said, and adapter 'default' has use_rslora=False"),
        ({"lr": math.nan}, "lr should be a finite number of at least 0, got nan"),
        ({"lr": -1}, "lr should be a finite number of at least 0, got -1"),
        ({"weight_decay": math.inf}, "weight_decay should be a finite number of at least 0, got inf"),
        ({"r": 0}, "r should be a finite number above 0, got 0"),
        ({"lora_alpha": "6"}, "lora_alpha should be a finite number above 0, got '6'"),
    ],
)
def test_bad_arguments_are_errors_and_change_nothing(said, problem):
    model = stack()
    with pytest.raises(ConfigError, match=f"\n  {problem}"):
        lorafa(model, **said)
    assert factors(model).lora_A.requires_grad


def test_agreeing_about_rslora_is_fine():
    lorafa(stack(use_rslora=True), use_rslora=True)


def test_a_model_without_an_adapter_that_trains_is_an_error():
    with pytest.raises(AdapterNameError, match="no adapter to optimize"):
        lorafa(tiny.Stack())
    model = stack()
    model.set_requires_grad("default", False)
    with pytest.raises(AdapterNameError, match="No adapter of the model trains"):
        lorafa(model)
    model.set_requires_grad("default", True)
    factors(model).lora_B.requires_grad_(False)
    with pytest.raises(AdapterNameError, match="every lora_B of the model is frozen"):
        lorafa(model)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_betas_have_a_range(betas):
    with pytest.raises(ConfigError, match="betas should be two numbers"):
        LoraFAOptimizer([{"params": [nn.Parameter(torch.ones(2))]}], betas=betas)

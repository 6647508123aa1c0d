"""Which adapters act, and that gradient checkpointing recomputes with those of forward time."""

import pytest
import torch

import tiny
import veneer
from veneer.errors import AttachError
from veneer.layers.route import Part, Route, RoutedCheckpoint, parts_of


def planned(route: Route) -> tuple[str, ...]:
    return tuple(step.name for step in route.plan)


def test_what_follows_from_what_is_chosen():
    route = Route()
    route.set(active=("a", "b"))
    assert (route.acting, planned(route)) == (("a", "b"), ("a", "b"))
    route.set(merged=("a",))
    assert (route.acting, planned(route)) == (("a",), ())
    route.set(enabled=False)
    assert (route.acting, planned(route)) == ((), ())
    route.set(enabled=True, merged=())
    assert planned(route) == ("a", "b")


def test_following_ends_with_its_block_even_by_an_error():
    route = Route()
    route.set(active=("a",))
    with pytest.raises(ZeroDivisionError), route.following((), ()):
        _ = 1 / len(route.plan)
    assert planned(route) == ("a",)


ROWS = ["a", "b", None, "a"]


@pytest.mark.parametrize("times", [1, 3])
def test_each_row_gets_its_own_update(times):
    x, y = torch.randn(4 * times, 5), torch.randn(4 * times, 5)
    updates = {"a": lambda x, y: y + x, "b": lambda x, y: y * x}
    found = y
    for name, part in parts_of(ROWS).items():
        found = part.through(updates[name], x, found)
    for row, name in enumerate(ROWS):
        for i in range(row * times, (row + 1) * times):
            expected = y[i] if name is None else updates[name](x[i], y[i])
            assert torch.equal(found[i], expected)


def test_a_part_of_the_tokens():
    x, y = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    part = Part(2, tokens=mask)
    found = part.through(lambda x, y: y + x, x, y)
    assert torch.equal(found, torch.where(mask.unsqueeze(-1), y + x, y))
    flat = part.through(lambda x, y: y + x, x.flatten(0, 1), y.flatten(0, 1))
    assert torch.equal(flat, found.flatten(0, 1))
    beams = part.through(lambda x, y: y + x, x.repeat_interleave(2, 0), y.repeat_interleave(2, 0))
    assert torch.equal(beams, found.repeat_interleave(2, 0))


def test_a_batch_of_another_size_is_refused():
    part = parts_of(ROWS)["a"]
    with pytest.raises(AttachError, match="got 6 rows where the batch has 4"):
        part.through(lambda x, y: y, torch.zeros(6, 2), torch.zeros(6, 2))
    with pytest.raises(AttachError, match="on which of them the adapter acts cannot be told"):
        Part(2, tokens=torch.ones(2, 3, dtype=torch.bool)).through(lambda x, y: y, torch.zeros(2, 2), torch.zeros(2, 2))


def test_serving_ends_with_its_block():
    route = Route()
    route.set(active=("c",))
    with route.serving(parts_of(ROWS)):
        assert (route.acting, planned(route)) == (("a", "b"), ("a", "b"))
    assert (route.acting, planned(route)) == (("c",), ("c",))


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


def test_tokens_of_some_rows():
    tokens = torch.tensor([[True, True, True], [False, False, True]])
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found = Part(2, torch.tensor([1]), tokens).through(lambda x, y: y + x, x, y)
    expected = y.clone()
    expected[1, 2] += x[1, 2]
    assert torch.equal(found, expected)


def test_an_input_without_rows_or_with_more_tokens_is_refused():
    with pytest.raises(AttachError, match="got 0 rows"):
        Part(2).check(torch.zeros(0, 3))
    x = torch.zeros(2, 4, 3)
    with pytest.raises(AttachError, match="rows have 3 tokens"):
        Part(2, None, torch.ones(2, 3, dtype=torch.bool)).through(lambda x, y: y, x, x)


def test_what_parts_share_is_made_once_for_each_set_of_them():
    a, b, c = Part(2), Part(2), Part(2)
    made = [a.shared(parts, object) for parts in ((a, b), (a, c), (a, b))]
    assert made[0] is made[2] is not made[1]
    a.forget()
    assert a.shared((a, b), object) is not made[0]

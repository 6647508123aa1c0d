"""Merging: exact, reversible bit for bit, all or nothing."""

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer.errors import MergeError, VeneerWarning

ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(base=None, **fields) -> veneer.PeftModel:
    base = tiny.llama() if base is None else base
    return tiny.shake(veneer.get_peft_model(base, veneer.LoraConfig(**{**ALL, **fields})))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_unmerging_is_exact_however_often(dtype, dora):
    model = adapted(tiny.llama(dtype=dtype), use_dora=dora)
    before = state(model)
    for _ in range(5):
        model.merge_adapter()
        name = "base_model.model.model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(state(model)[name], before[name]), "nothing was merged: a void test"
        model.unmerge_adapter()
    assert_same(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_weight_is_the_exact_sum_rounded_once(dtype):
    model = adapted(tiny.llama(dtype=dtype))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    adapter = layer.adapters["default"]
    exact = layer.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    model.merge_adapter()
    assert torch.equal(layer.weight, exact.to(dtype))


def test_merging_twice_or_unmerging_nothing_is_an_error():
    model = adapted()
    with pytest.raises(MergeError, match="Nothing is merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged already"):
        model.merge_adapter()


def pair(**fields) -> veneer.PeftModel:
    model = adapted(**fields)
    model.add_adapter("other", veneer.LoraConfig(**{**ALL, "r": 3, "init_lora_weights": False}))
    return model


@pytest.mark.parametrize("more", [["other"], ["other", "default"]])
def test_merging_one_more_is_merging_both_at_once(more):
    model = pair()
    before = state(model)
    model.merge_adapter(["default", "other"])
    together = state(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(more)
    assert_same(state(model), together)
    model.unmerge_adapter()
    assert_same(state(model), before)


def test_one_more_that_cannot_be_merged_leaves_what_was_merged():
    model = pair()
    model.merge_adapter(["default"])
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.adapters["other"].lora_B.fill_(float("inf"))
    before = state(model)
    with pytest.raises(MergeError, match="NaN or infinity"):
        model.merge_adapter(["other"])
    assert_same(state(model), before)
    with pytest.raises(MergeError, match="'default' is merged already"):
        model.merge_adapter()


def test_deleting_another_adapter_leaves_what_is_merged():
    model = pair()
    before = {name: value for name, value in state(model).items() if ".other." not in name}
    model.merge_adapter(["default"])
    merged = {name: value for name, value in state(model).items() if ".other." not in name}
    with pytest.raises(ValueError, match="'default' cannot be removed while it is merged"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert_same(state(model), merged)
    model.unmerge_adapter()
    assert_same(state(model), before)


def test_changing_the_adapter_while_merged_does_not_hurt_the_base():
    model = adapted()
    base = tiny.llama()
    model.merge_adapter()
    tiny.shake(model, seed=9)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(tiny.ids()).logits, base(tiny.ids()).logits)


def test_disabling_while_merged_gives_the_base_and_merges_again():
    model = adapted()
    model.merge_adapter()
    merged = model(tiny.ids()).logits
    with model.disable_adapter():
        assert torch.equal(model(tiny.ids()).logits, tiny.llama()(tiny.ids()).logits)
    assert torch.equal(model(tiny.ids()).logits, merged)


def test_choosing_another_adapter_while_merged_unmerges():
    model = adapted()
    model.add_adapter("b", veneer.LoraConfig(**ALL))
    model.merge_adapter()
    model.set_adapter("b")
    torch.testing.assert_close(model(tiny.ids()).logits, tiny.llama()(tiny.ids()).logits)


def test_saving_while_merged_saves_the_adapter(tmp_path):
    model = adapted()
    expected = model(tiny.ids()).logits
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(again(tiny.ids()).logits, expected)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_an_overflow_is_refused_and_changes_nothing(call):
    model = adapted(tiny.llama(dtype=torch.float16))
    last = model.get_base_model().model.layers[1].mlp.down_proj.adapters["default"]
    with torch.no_grad():
        last.lora_B.fill_(6e4)
    before = state(model)
    with pytest.raises(MergeError, match=r"1 weight\(s\)[\s\S]*layers.1.mlp.down_proj.* would hold NaN or infinity"):
        getattr(model, call)()
    assert_same(state(model), before)
    assert model.active_adapters == ["default"]


def test_the_merged_model_is_plain():
    model = adapted()
    expected = model(tiny.ids()).logits
    merged = model.merge_and_unload()
    fresh = tiny.llama()
    assert type(merged) is type(fresh)
    assert list(merged.state_dict()) == list(fresh.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in fresh.modules()]
    assert "peft_config" not in vars(merged)
    torch.testing.assert_close(merged(tiny.ids()).logits, expected)


def test_unloading_gives_the_base_back():
    model = adapted(modules_to_save=["lm_head"])
    model.merge_adapter()
    plain = model.unload()
    assert_same(state(plain), state(tiny.llama()))


def test_merging_some_adapters():
    model = adapted()
    model.add_adapter("b", veneer.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    both = model(tiny.ids()).logits
    model.set_adapter("b")
    only_b = model(tiny.ids()).logits
    model.merge_adapter(["default", "b"])
    torch.testing.assert_close(model(tiny.ids()).logits, both)
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(merged(tiny.ids()).logits, only_b)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_tied_weights_are_merged_once_and_untied(fields, tmp_path):
    """PEFT adds the delta to the shared weight, so that embedding and head both change."""
    from transformers import LlamaForCausalLM

    with pytest.warns(VeneerWarning, match="share one weight"):
        model = adapted(tiny.llama(tied=True), **fields)
    expected = model(tiny.ids()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tiny.ids()).logits, expected)
    model.unmerge_adapter()
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tiny.ids()).logits, expected)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tiny.ids()).logits, expected)


def test_casting_the_model_while_merged():
    model = adapted()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert model.get_base_model().model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    with model.disable_adapter():
        expected = tiny.llama(dtype=torch.bfloat16)(tiny.ids()).logits
        assert torch.equal(model(tiny.ids()).logits, expected)


def test_folding_in_makes_each_sum_once(monkeypatch):
    from veneer.layers import merging

    model, sums = adapted(), []
    sites = sum(1 for name, _ in model.named_parameters() if "lora_A" in name)
    real = merging.add_products
    monkeypatch.setattr(merging, "add_products", lambda *given: sums.append(1) or real(*given))
    model.merge_and_unload()
    assert len(sums) == sites > 0


def test_folding_in_checks_closely_where_a_bound_does_not_do(monkeypatch):
    from veneer.layers import merging

    asked = []
    monkeypatch.setattr(merging, "stays_finite", lambda *given: asked.append(1))
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    adapter = layer.adapters["default"]
    exact = layer.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    assert torch.equal(model.merge_and_unload().model.layers[0].self_attn.q_proj.weight, exact.float())
    assert asked

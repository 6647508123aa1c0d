"""What other libraries call on an adapted layer: what it does, and that it gives way to the base's own names."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from veneer.errors import AttachError, MergeError, VeneerWarning
from veneer.layers.attach import Adapted
from veneer.layers.kinds import LINEAR, register_kind
from veneer.layers.kinds.kind import Kind
from veneer.layers.swap import base_class
from veneer.model.overlay import overlay_of

X = torch.arange(12).reshape(2, 6)


def adapted(*names: str, base: nn.Module | None = None, **fields) -> nn.Module:
    """A tiny Llama with adapters in place that change its output."""
    model = tiny.llama() if base is None else base
    generator = torch.Generator().manual_seed(0)
    for name in names or ("a",):
        config = veneer.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields})
        overlay = overlay_of(model)
        veneer.LoraModel(model).add_adapter(name, config, generator=generator)
        assert overlay_of(model) is (overlay or overlay_of(model))
    return model


def layers(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, Adapted)]


def on_all(model: nn.Module, method: str, *args, **kwargs) -> None:
    """As libraries do it."""
    for module in model.modules():
        if isinstance(module, Adapted):
            getattr(module, method)(*args, **kwargs)


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits


class TestWhichAdapterActs:
    def test_set_adapter_acts_as_on_the_model(self):
        model, other = adapted("a", "b"), adapted("a", "b")
        for names in ("b", ["a", "b"], ["b", "a"], "a"):
            on_all(model, "set_adapter", names)
            veneer.LoraModel(other).set_adapter(names)
            assert_close(out(model), out(other), rtol=0, atol=0)
            trains = {name: p.requires_grad for name, p in model.named_parameters()}
            assert trains == {name: p.requires_grad for name, p in other.named_parameters()}
        assert layers(model)[0].active_adapters == ["a"]

    def test_inference_mode_freezes(self):
        model = adapted("a", "b")
        on_all(model, "set_adapter", "b", inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())
        on_all(model, "set_requires_grad", "b", True)
        assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"b"}

    def test_disabling_and_enabling(self):
        model = adapted()
        bare, acting = out(tiny.llama()), out(model)
        on_all(model, "enable_adapters", enabled=False)
        assert layers(model)[0].disable_adapters is True
        assert not any(p.requires_grad for p in model.parameters())
        assert_close(out(model), bare, rtol=0, atol=0)
        on_all(model, "enable_adapters", True)
        assert_close(out(model), acting, rtol=0, atol=0)
        assert any(p.requires_grad for p in model.parameters())

    def test_names_of_other_models_are_remembered_but_do_not_act(self):
        model = adapted("a")
        acting = out(model)
        on_all(model, "set_adapter", ["a", "elsewhere"])
        assert layers(model)[0].active_adapters == ["a", "elsewhere"]
        assert_close(out(model), acting, rtol=0, atol=0)
        veneer.LoraModel(model).add_adapter("b", veneer.LoraConfig(target_modules=["q_proj"]))
        with pytest.warns(VeneerWarning, match="No adapter 'typo' lies on this model"):
            layers(model)[0].set_adapter("typo")
        assert_close(out(model), out(tiny.llama()), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["active_adapter", "active_adapters", "disable_adapters", "merged", "scaling"])
    def test_state_cannot_be_assigned(self, name):
        layer = layers(adapted())[0]
        with pytest.raises(AttributeError, match=f"{name} cannot be assigned: use"):
            setattr(layer, name, True)

    def test_what_replaces_parameters_of_the_base_is_refused(self):
        model = adapted(base=tiny.gpt2(), target_modules=["c_attn"], bias="all")
        on_all(model, "set_adapter", "a")  # changes nothing
        layer = layers(model)[0]
        for call, instead in (
            (lambda: layer.enable_adapters(False), "disable_adapter"),
            (lambda: layer.delete_adapter("a"), "delete_adapter"),
            (lambda: layer.set_adapter([]), "set_adapter"),
            (layer.merge, "merge_adapter"),
        ):
            with pytest.raises(AttachError, match=rf"cannot exchange those: call {instead}"):
                call()


class TestWeights:
    def test_layer_by_layer_merging_is_merging_the_model(self):
        model, other = adapted("a", "b"), adapted("a", "b")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        on_all(model, "merge")
        veneer.LoraModel(other).merge_adapter()
        for name, value in other.state_dict().items():
            assert_close(model.state_dict()[name], value, rtol=0, atol=0)
        assert_close(out(model), out(other), rtol=0, atol=0)
        assert layers(model)[0].merged is True
        assert layers(model)[0].merged_adapters == ["a"]
        on_all(model, "unmerge")
        for name, value in before.items():
            assert_close(model.state_dict()[name], value, rtol=0, atol=0)
        assert layers(model)[0].merged is False

    @pytest.mark.parametrize("fields", [{}, {"use_dora": True}])
    def test_a_part_of_the_layers(self, fields):
        model = adapted(**fields)
        acting = out(model)
        layers(model)[1].merge()
        assert_close(out(model), acting)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert_close(out(copied), acting)
        with pytest.raises(MergeError, match="'a' is merged already"):
            veneer.LoraModel(model).merge_adapter()
        with pytest.raises(MergeError, match="Unmerge a first"):
            veneer.LoraModel(model).add_adapter("b", veneer.LoraConfig(target_modules=["q_proj"]))
        veneer.LoraModel(copied).unmerge_adapter()
        assert not any(layer.merged for layer in layers(copied))
        assert_close(out(copied), acting)
        with veneer.PeftModel._over(model).disable_adapter():
            assert_close(out(model), out(tiny.llama()), rtol=0, atol=0)
        assert [layer.merged for layer in layers(model)] == [False, True, False, False]
        assert_close(out(model), acting)

    def test_one_after_the_other(self):
        model = adapted("a", "b")
        on_all(model, "set_adapter", ["a", "b"])
        both = out(model)
        on_all(model, "merge", adapter_names=["a"])
        on_all(model, "merge", adapter_names=["a", "b", "elsewhere"])
        assert layers(model)[0].merged_adapters == ["a", "b"]
        assert_close(out(model), both)
        with pytest.raises(MergeError, match="unmerge before another adapter acts"):
            layers(model)[0].set_adapter("b")
        with pytest.raises(MergeError, match="cannot be deleted while it is merged"):
            layers(model)[0].delete_adapter("a")
        on_all(model, "enable_adapters", False)
        assert_close(out(model), out(tiny.llama()), rtol=0, atol=0)

    def test_nothing_is_merged_or_by_the_model(self):
        model = adapted()
        with pytest.warns(VeneerWarning, match="Nothing is merged"):
            layers(model)[0].unmerge()
        veneer.LoraModel(model).merge_adapter()
        layers(model)[0].merge()  # it is
        for call in (layers(model)[0].unmerge, lambda: layers(model)[0].enable_adapters(False)):
            with pytest.raises(MergeError, match="unmerge_adapter"):
                call()

    def test_a_layer_that_would_overflow_keeps_its_weight(self):
        model = adapted(base=tiny.llama().half())
        layer = layers(model)[0]
        weight = layer.weight
        layer.lora_B["a"].weight.data.fill_(1e6)
        with pytest.raises(MergeError, match="would hold NaN or infinity"):
            layer.merge()
        assert layer.weight is weight
        assert not layer.merged

    def test_scales_go_on_and_off_around_a_merged_layer(self):
        model = adapted()
        on_all(model, "scale_layer", 0.5)
        half = out(model)
        on_all(model, "merge")
        on_all(model, "scale_layer", 0.25)
        assert_close(out(model), half)
        on_all(model, "unscale_layer", 0.25)
        with pytest.raises(MergeError, match="part of the merged weights"):
            layers(model)[0].set_scale("a", 2)
        on_all(model, "unmerge")
        assert_close(out(model), half)

    def test_experts_and_attention(self):
        attention = nn.MultiheadAttention(8, 2)
        model = veneer.inject_adapter_in_model(
            veneer.LoraConfig(target_modules=["0"], init_lora_weights=False), nn.Sequential(attention), "a"
        )
        x = torch.randn(3, 8)
        acting = attention(x, x, x)[0]
        assert len(layers(model)) == 2
        on_all(model, "merge")
        assert_close(attention(x, x, x)[0], acting)
        twin = attention.get_base_layer()
        assert twin.in_proj_weight is attention.in_proj_weight
        assert_close(twin(x, x, x)[0], acting)
        on_all(model, "unmerge")
        plain = copy.deepcopy(twin)
        plain.out_proj = plain.out_proj.get_base_layer()
        assert not torch.allclose(plain(x, x, x)[0], acting)
        assert list(attention.r) == ["a"]
        assert attention.get_delta_weight("a").shape == attention.in_proj_weight.shape


class TestBaseLayer:
    def test_it_is_the_layer_without_adapters(self):
        model = adapted()
        layer, x = layers(model)[0], torch.randn(2, 32)
        twin = layer.get_base_layer()
        assert type(twin) is nn.Linear
        assert twin.weight is layer.weight
        assert_close(twin(x), nn.functional.linear(x, layer.weight), rtol=0, atol=0)
        assert not hasattr(twin, "base_layer")
        layer.base_layer.weight = nn.Parameter(torch.zeros_like(twin.weight))
        assert not layer.weight.any()

    def test_accelerates_hook_is_the_twins_own(self):
        from accelerate.hooks import ModelHook, add_hook_to_module

        model = adapted()
        layer, x = layers(model)[0], torch.randn(2, 32)
        add_hook_to_module(layer, ModelHook())
        twin = layer.get_base_layer()
        assert_close(twin(x), nn.functional.linear(x, layer.weight), rtol=0, atol=0)
        assert not torch.allclose(layer(x), twin(x))
        plain = layers(model)[1]
        plain.forward = lambda x: x
        with pytest.raises(AttachError, match="replaced on the instance"):
            plain.get_base_layer()

    def test_putting_the_base_layers_back_by_hand(self):
        """As diffusers' `unload_lora_weights` does."""
        model = adapted(modules_to_save=["lm_head"])
        model.config.save = True
        bare = out(tiny.llama())
        for path in [path for path, _ in model.named_modules() if "lora" not in path]:
            try:
                target = model.get_submodule(path)
            except AttributeError:
                continue
            if hasattr(target, "base_layer"):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, target.get_base_layer())
        del model.peft_config
        assert overlay_of(model) is None
        assert type(model.lm_head) is nn.Linear
        assert not {"_veneer_overlay", "peft_config", "save_pretrained"} & vars(model).keys()
        assert list(model.state_dict()) == list(tiny.llama().state_dict())
        assert_close(out(model), bare, rtol=0, atol=0)
        adapted(base=model)
        assert not torch.allclose(out(model), bare)


class TestDeleting:
    def test_all_layers_and_then_the_name(self):
        """As diffusers' and transformers' `delete_adapters` do."""
        model = adapted("a", "b", modules_to_save=["lm_head"])
        on_all(model, "set_adapter", "b")
        alone = out(model)
        on_all(model, "set_adapter", "a")
        with pytest.warns(VeneerWarning, match="'a' was active; now 'b' is"):
            on_all(model, "delete_adapter", "a")
        model.peft_config.pop("a")
        assert_close(out(model), alone, rtol=0, atol=0)
        assert list(overlay_of(model).configs) == list(overlay_of(model).resolutions) == ["b"]
        assert not any(".a." in name for name, _ in model.named_parameters())
        trains = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {"b"}
        adapted("a", base=model)
        on_all(model, "delete_adapter", "a")
        on_all(model, "delete_adapter", "b")
        model.peft_config.clear()
        assert overlay_of(model) is None
        assert_close(out(model), out(tiny.llama()), rtol=0, atol=0)

    def test_what_a_layer_cannot_see_goes_too(self):
        model = adapted(base=tiny.gpt2(), target_modules=["c_attn"], bias="all")
        bias = model.transformer.h[0].ln_1.bias
        bias.data.add_(1)
        del model.peft_config
        assert overlay_of(model) is None
        assert not model.transformer.h[0].ln_1.bias.any()
        assert not layers(model)

    def test_merged_layers_are_put_back(self):
        model = adapted()
        on_all(model, "merge")
        model.peft_config.pop("a")
        assert overlay_of(model) is None
        assert_close(out(model), out(tiny.llama()), rtol=0, atol=0)


class Crowded(nn.Linear):
    """A layer whose own names are those of PEFT's layers."""

    unmerge = "a class attribute"

    def __init__(self):
        super().__init__(4, 4)
        self.scaling = 3.0
        self.r = nn.Parameter(torch.full((4,), 2.0))
        self.merged = nn.Identity()
        self.register_buffer("lora_alpha", torch.ones(1))
        self.register_buffer("use_dora", torch.ones(1))

    def merge(self, x):
        return x * self.scaling

    def forward(self, x):
        self.scaling = self.scaling + 0
        return self.merged(self.merge(super().forward(x))) * self.r * self.use_dora


def test_the_bases_own_names_win():
    base = Crowded()
    x = torch.randn(2, 4)
    before = base(x)
    model = veneer.inject_adapter_in_model(
        veneer.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False), nn.Sequential(base), "a"
    )
    assert isinstance(model[0], Adapted)
    assert_close(base.get_base_layer()(x), before, rtol=0, atol=0)
    assert base.scaling == 3.0
    assert base.r is base._parameters["r"]
    assert isinstance(base.merged, nn.Identity)
    assert base.unmerge == "a class attribute"
    assert base.use_dora is base._buffers["use_dora"]
    assert_close(base.merge(x), x * 3)
    assert base.active_adapters == ["a"]
    base.set_scale("a", 0.0)
    assert_close(base(x), before, rtol=0, atol=0)
    base.scaling = 5.0
    del base.scaling
    assert base.scaling["a"] == 0
    assert base_class(base) is Crowded


def test_saved_modules_and_token_rows_answer_too():
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3])
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.active_adapters == embedding.active_adapters == ["a"]
    assert_close(head.original_module.weight, tiny.llama().lm_head.weight, rtol=0, atol=0)
    assert list(head.modules_to_save) == ["a"]
    with torch.no_grad():
        embedding.token_rows["a"].trainable_tokens_delta.add_(1)
    embedded = embedding(X)
    embedding.merge()
    assert_close(embedding(X), embedded)
    assert_close(embedding.weight[3], tiny.llama().model.embed_tokens.weight[3] + 1)
    embedding.unmerge()
    head.enable_adapters(False)
    assert_close(out(model), out(tiny.llama()), rtol=0, atol=0)
    head.set_adapter("a")
    head.enable_adapters(True)
    assert all(p.requires_grad for p in head.modules_to_save.parameters())


def test_a_kind_of_ones_own():
    class Mine(nn.Linear):
        pass

    register_kind(Mine, Kind("mine", LINEAR.dims))
    model = veneer.inject_adapter_in_model(
        veneer.LoraConfig(r=2, lora_alpha=2, target_modules=["0"]), nn.Sequential(Mine(3, 3)), "a"
    )
    assert model[0].scaling["a"] == 1.0

"""Adapters over a base that accelerate keeps on the CPU or on disk and brings in layer by layer."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
import tiny_moe
import veneer
from veneer.errors import AttachError, ConfigError
from veneer.integrations.transformers import add_adapter, load_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*share one weight:veneer.errors.VeneerWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning"),
]


def on_cpu(model: nn.Module) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def on_disk(model: nn.Module, folder: str | None = None) -> nn.Module:
    return disk_offload(model, folder or mkdtemp(), execution_device="cpu")


def twice(model: nn.Module) -> nn.Module:
    """Its layers have a group of hooks, of which the last one counts."""
    folder = mkdtemp()
    return on_disk(on_disk(model, folder), folder)


def device_map(model: nn.Module) -> dict[str, str]:
    head = "cpu" if model.config.tie_word_embeddings else "disk"
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
    return {**parts, "model.rotary_emb": "cpu", "lm_head": head}


def by_layer(model: nn.Module) -> nn.Module:
    return dispatch_model(model, device_map(model), offload_dir=mkdtemp(), skip_keys="past_key_values")


def loaded(model: nn.Module) -> nn.Module:
    folder = mkdtemp()
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map(model), offload_folder=mkdtemp(), dtype=next(model.parameters()).dtype
    ).eval()


WAYS = {"cpu": on_cpu, "disk": on_disk, "by_layer": by_layer, "loaded": loaded, "twice": twice}
ways = pytest.mark.parametrize("offloaded", WAYS.values(), ids=WAYS)


def config(*targets: str, **fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(r=2, target_modules=list(targets) or ["q_proj", "down_proj"], **fields)


def adapted(base: nn.Module, settings: veneer.LoraConfig) -> veneer.PeftModel:
    return veneer.get_peft_model(base, settings, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny.ids()).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    return {name: parameter.grad for name, parameter in trained(model).items()}


def pair(offloaded: Callable, settings: veneer.LoraConfig, base: Callable = tiny.llama):
    """The same adapter over the base as it is, and over the offloaded one; equal as they start."""
    plain, away = adapted(base(), settings), adapted(offloaded(base()), settings)
    for name, parameter in trained(plain).items():
        assert_close(trained(away)[name], parameter, atol=1e-6, rtol=0)
    tiny.shake(plain)
    tiny.shake(away)
    return plain, away


FORMS = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora_dora": {"init_lora_weights": "olora", "use_dora": True},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "token_rows": {"trainable_token_indices": [3, 5]},
}


CASES = {
    f"{way} {form}": (WAYS[way], FORMS[form])
    for way in WAYS
    for form in FORMS
    if way in ("cpu", "loaded") or form in ("lora", "dora")
}


@pytest.mark.parametrize(("offloaded", "fields"), CASES.values(), ids=CASES)
def test_an_adapter_is_the_same_over_an_offloaded_base(offloaded, fields, tmp_path):
    base = logits(offloaded(tiny.llama()))
    plain, away = pair(offloaded, config(**fields))
    expected = logits(plain)
    assert_close(logits(away), expected, atol=1e-6, rtol=1e-5)
    theirs = gradients(plain)
    for name, gradient in gradients(away).items():
        assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-5)
    with away.disable_adapter():
        assert torch.equal(logits(away), base)
    away.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(offloaded(tiny.llama()), tmp_path)
    assert_close(logits(again), expected, atol=1e-6, rtol=1e-5)
    away.merge_adapter()
    assert_close(logits(away), expected, atol=1e-4, rtol=1e-4)
    away.unmerge_adapter()
    assert_close(logits(away), expected, atol=1e-6, rtol=1e-5)
    merged = away.merge_and_unload()
    assert_close(logits(merged), logits(plain.merge_and_unload()), atol=1e-6, rtol=1e-5)
    assert not hasattr(merged, "peft_config")


TIED = {
    "token_rows": {"trainable_token_indices": [3, 5]},
    "one_adapter": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "one_copy": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "head_alone": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("fields", TIED.values(), ids=TIED)
@pytest.mark.parametrize("offloaded", [on_cpu, by_layer, loaded])
def test_a_tied_head_stays_tied(offloaded, fields, tmp_path):
    plain, away = pair(
        offloaded, config(*fields.get("target_modules", [])).changed(**fields), lambda: tiny.llama(tied=True)
    )
    assert_close(logits(away), logits(plain), atol=1e-6, rtol=1e-5)
    theirs = gradients(plain)
    for name, gradient in gradients(away).items():
        assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-5)
    plain, away = plain.merge_and_unload(), away.merge_and_unload()
    assert away.config.tie_word_embeddings == plain.config.tie_word_embeddings
    if offloaded is on_cpu:  # transformers saves what from_pretrained or dispatch_model offloaded
        remove_hook_from_submodules(away)
    away.save_pretrained(tmp_path)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain), atol=1e-6, rtol=1e-5)


class TestTheBase:
    @ways
    def test_nothing_is_left_of_the_adapters(self, offloaded):
        base = offloaded(tiny.llama())
        classes, before = [type(module) for module in base.modules()], logits(base)
        model = adapted(base, config(init_lora_weights=False, modules_to_save=["lm_head"]))
        one = logits(model)
        model.add_adapter("other", config("v_proj", use_dora=True, init_lora_weights=False))
        model.set_adapter("other")
        assert not torch.equal(logits(model), one)
        model.set_adapter("default")
        model.delete_adapter("other")
        assert torch.equal(logits(model), one)
        assert torch.equal(logits(model.unload()), before)
        assert [type(module) for module in base.modules()] == classes

    @pytest.mark.parametrize("offloaded", [on_cpu, on_disk, by_layer, twice])
    def test_hooks_may_be_taken_off_and_put_on_at_any_time(self, offloaded):
        base, before = tiny.llama(), logits(tiny.llama())
        model = adapted(offloaded(base), config(init_lora_weights=False))
        expected = logits(model)
        model.merge_adapter()
        remove_hook_from_submodules(base)
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        model.merge_adapter()
        on_cpu(base)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        remove_hook_from_submodules(base)
        assert torch.equal(logits(model.unload()), before)
        adapted(base, config())

    def test_no_file_of_the_base_is_touched(self, tmp_path):
        base = on_disk(tiny.llama(), str(tmp_path))
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        adapted(base, config(init_lora_weights=False)).merge_and_unload()
        if os.name == "posix":  # elsewhere a file cannot go while its numbers are in use
            assert sorted(before) == sorted(path.name for path in tmp_path.iterdir())
        assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
        assert torch.equal(logits(on_disk(tiny.llama(), str(tmp_path))), logits(tiny.llama()))

    @pytest.mark.parametrize("offloaded", [by_layer, loaded])
    def test_it_is_saved_without_the_adapter(self, offloaded, tmp_path):
        base = offloaded(tiny.llama())
        adapted(base, config(init_lora_weights=False))
        base.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(tiny.llama()))

    def test_a_checkpoint_in_another_dtype_is_read_in_the_models(self, tmp_path):
        tiny.llama().save_pretrained(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map(tiny.llama()), offload_folder=mkdtemp(), dtype=torch.bfloat16
        )
        plain = adapted(tiny.llama(dtype=torch.bfloat16), config(use_dora=True))
        away = adapted(base, config(use_dora=True))
        for name, parameter in trained(plain).items():
            assert torch.equal(trained(away)[name], parameter)
        away.merge_and_unload()
        assert logits(base).dtype == torch.bfloat16

    def test_device_map_auto_without_an_accelerator(self, tmp_path):
        tiny.llama().save_pretrained(tmp_path)
        model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto"), config(use_dora=True))
        assert torch.equal(logits(model), logits(adapted(tiny.llama(), config(use_dora=True))))


class TestAttachedBefore:
    """Adapters stay where they are when a model that has some is offloaded."""

    def settings(self) -> veneer.LoraConfig:
        return config(init_lora_weights=False, modules_to_save=["lm_head"], trainable_token_indices=[3])

    def steps(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
        optimizer = optimizer or torch.optim.SGD(trained(model).values(), lr=0.5)
        for _ in range(3):
            gradients(model)
            optimizer.step()
        return logits(model)

    @pytest.mark.parametrize("offloaded", [on_cpu, on_disk])
    def test_they_train(self, offloaded, tmp_path):
        expected = self.steps(adapted(tiny.llama(), self.settings()))
        model = adapted(tiny.llama(), self.settings())
        offloaded(model.get_base_model())
        assert_close(self.steps(model), expected)
        model.save_pretrained(tmp_path)
        again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
        assert_close(logits(again), expected)

    def test_they_are_saved_before_the_first_call(self, tmp_path):
        model = adapted(tiny.llama(), self.settings())
        expected = logits(model)
        on_cpu(model.get_base_model())
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)), expected)

    def test_two_of_them(self):
        model = adapted(tiny.llama(), self.settings())
        model.add_adapter("other", config(init_lora_weights=False, use_dora=True))
        expected = [logits(model)]
        model.set_adapter("other")
        expected.append(logits(model))
        on_disk(model.get_base_model())
        assert torch.equal(logits(model), expected[1])
        model.set_adapter("default")
        assert torch.equal(logits(model), expected[0])
        model.merge_and_unload()


class TestOtherKinds:
    def test_a_bias_takes_in_the_adapters(self):
        def base() -> nn.Module:
            return tiny.gpt2()

        plain, away = pair(on_cpu, config("c_attn", "c_fc", lora_bias=True), base)
        assert_close(logits(away), logits(plain), atol=1e-6, rtol=1e-5)
        expected = logits(away)
        away.merge_adapter()
        assert_close(logits(away), expected, atol=1e-4, rtol=1e-4)
        away.unmerge_adapter()
        assert torch.equal(logits(away), expected)

    def test_fused_experts(self):
        settings = veneer.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=tiny_moe.BOTH, use_dora=True)
        plain, away = pair(on_disk, settings, tiny_moe.mixtral)
        assert_close(logits(away), logits(plain), atol=1e-6, rtol=1e-5)
        assert_close(logits(away.merge_and_unload()), logits(plain.merge_and_unload()), atol=1e-6, rtol=1e-5)

    def test_rows_of_a_batch(self):
        def mixed(base: nn.Module) -> Tensor:
            model = adapted(base, config(init_lora_weights=False))
            torch.manual_seed(0)
            model.add_adapter("other", config(init_lora_weights=False))
            with torch.no_grad():
                return model.eval()(tiny.ids(), adapter_names=["default", "other", "__base__"]).logits

        assert torch.equal(mixed(on_cpu(tiny.llama())), mixed(tiny.llama()))

    def test_replicated_layers(self):
        plain, away = pair(on_cpu, config(layer_replication=[(0, 2), (0, 2)]))
        assert_close(logits(away), logits(plain), atol=1e-6, rtol=1e-5)
        assert_close(logits(away.merge_and_unload()), logits(plain.merge_and_unload()), atol=1e-6, rtol=1e-5)

    def test_a_plain_lora_of_a_dora(self):
        models = pair(on_cpu, config(use_dora=True))
        (_, plain), (_, away) = (veneer.convert_to_lora(model, 2) for model in models)
        assert all(torch.allclose(away[key], value, atol=1e-5) for key, value in plain.items())


@pytest.mark.parametrize("offloaded", [on_cpu, loaded])
def test_in_place(offloaded, tmp_path):
    model = offloaded(tiny.llama())
    add_adapter(model, config(use_dora=True, init_lora_weights=False))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert [path.name for path in Path(tmp_path).glob("*.safetensors")] == ["adapter_model.safetensors"]
    again = offloaded(tiny.llama())
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    tokens = again.generate(tiny.ids(), max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, model.generate(tiny.ids(), max_new_tokens=3, do_sample=False))


class TestRefused:
    """What would lose its gradients, or change weights that are not there."""

    def test_weights_replaced_at_the_start(self):
        with pytest.raises(AttachError, match="loftq.*is offloaded"):
            adapted(on_cpu(tiny.llama()), config(init_lora_weights="loftq"))

    def test_biases(self):
        with pytest.raises(AttachError, match="bias: .* is offloaded, so it would get no gradient"):
            adapted(on_cpu(tiny.gpt2()), config("c_attn", bias="lora_only"))

    def test_modules_that_are_brought_in_as_one(self):
        base = cpu_offload(tiny.llama(), execution_device="cpu", preload_module_classes=["LlamaMLP"])
        with pytest.raises(AttachError, match="is inside model.layers.0.mlp, which is offloaded as one"):
            adapted(base, config())
        adapted(base, config("q_proj"))(tiny.ids())

    def test_gradients_of_weights(self):
        base = on_cpu(tiny.llama())
        settings = config(init_lora_weights="lora_ga", lora_ga_config=veneer.LoraGAConfig())
        with pytest.raises(ConfigError, match="these are offloaded"):
            veneer.preprocess_loraga(base, settings, lambda: None)

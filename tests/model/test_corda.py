"""CorDA from the whole model's own inputs, against PEFT's flow; its files, and what is refused."""

import dataclasses
import json
import sys

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as TheirCordaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.errors import AdapterFileError, ConfigError
from veneer.model.overlay import adapters_by_site

with pytest.MonkeyPatch.context() as patch:  # PEFT takes `dataclass` from attrs, which need not be installed
    patch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.corda import preprocess_corda

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
FIELDS = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
GPT2 = {**FIELDS, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def config(fields=None, **settings):
    return veneer.LoraConfig(**{**FIELDS, **(fields or {})}, init_lora_weights="corda", corda_config=settings)


def samples(model, count=24):
    """A function that runs the model on single samples, as PEFT wants them."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 64, (1, 12), generator=generator) for _ in range(count)]

    def run():
        for row in rows:
            model(row)

    return run


def products(model):
    adapters = {site.path: adapter for site, adapter in adapters_by_site(model, "default")}
    return {path: (adapter.lora_B @ adapter.lora_A).detach() for path, adapter in adapters.items()}


def their_products(model):
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            B, A = module.lora_B["default"].weight, module.lora_A["default"].weight
            found[name.removeprefix("base_model.model.")] = (B @ A).detach()
    return found


def made_by_peft(base, fields, **settings):
    theirs = peft.LoraConfig(**fields, init_lora_weights="corda", corda_config=TheirCordaConfig(**settings))
    oracle.quietly(preprocess_corda, base, theirs, run_model=samples(base))
    return oracle.quietly(peft.get_peft_model, base, theirs).eval()


def answer(model):
    with torch.no_grad():
        return model(tiny.ids()).logits


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize(("make", "fields"), [(tiny.llama, FIELDS), (tiny.gpt2, GPT2)])
def test_it_starts_as_peft_s_does(make, fields, method, tmp_path):
    base = make()
    settings = config(fields, corda_method=method)
    veneer.preprocess_corda(base, settings, samples(base))
    ours = veneer.get_peft_model(base, settings)
    theirs = made_by_peft(make(), fields, corda_method=method)
    expected = their_products(theirs)
    found = products(ours.bare)
    assert found.keys() == expected.keys()
    for path, product in expected.items():
        assert_close(found[path], product, **CLOSE)
        assert product.norm() > 1e-3
    assert_close(answer(ours), answer(make()), rtol=1e-4, atol=1e-5)
    tiny.shake(ours)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert_close(answer(oracle.read_by_peft(make(), tmp_path).eval()), answer(ours), **CLOSE)
    assert torch.equal(answer(ours.unload()), answer(make()))


def test_samples_of_a_batch_count_singly():
    one, other = tiny.llama(), tiny.llama()
    veneer.preprocess_corda(one, config(), lambda: [one(row[None]) for row in tiny.ids()])
    veneer.preprocess_corda(other, config(), lambda: other(tiny.ids()))
    found = [products(veneer.get_peft_model(model, config()).bare) for model in (one, other)]
    for path, product in found[0].items():
        assert_close(found[1][path], product, **CLOSE)


def test_the_model_is_left_as_it_was_and_ran_without_gradients_as_the_base():
    model = tiny.shake(veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS)))
    model.train()
    model.bare.lm_head.eval()
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, tiny.llama()(tiny.ids()).logits
    seen = []

    def run():
        assert not torch.is_grad_enabled()
        assert not model.bare.training
        seen.append(model(tiny.ids()).logits)

    veneer.preprocess_corda(model, config(), run)
    assert torch.equal(seen[0], expected)
    assert model.bare.training
    assert not model.bare.lm_head.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.add_adapter("second", config())
    model.set_adapter("second")
    assert_close(answer(model.eval()), expected, rtol=1e-4, atol=1e-5)


def test_another_model_may_run_in_its_place():
    base, other = tiny.llama(), tiny.llama()
    veneer.preprocess_corda(base, config(), samples(other), hooked_model=other)
    found = products(veneer.get_peft_model(base, config()).bare)
    assert type(other.model.layers[0].self_attn.q_proj) is nn.Linear
    again = tiny.llama()
    veneer.preprocess_corda(again, config(), samples(again))
    for path, product in products(veneer.get_peft_model(again, config()).bare).items():
        assert torch.equal(found[path], product)
    with pytest.raises(ConfigError, match="hooked_model has no layer model"):
        veneer.preprocess_corda(tiny.llama(), config(), samples(other), hooked_model=other.model)


@pytest.mark.parametrize("field", ["cache_file", "covariance_file"])
def test_files_are_written_once_and_read_afterwards(field, tmp_path):
    settings = config(**{field: tmp_path / "deep" / "kept.safetensors"})
    base = tiny.llama()
    veneer.preprocess_corda(base, settings, samples(base))
    found = products(veneer.get_peft_model(base, settings).bare)
    again = tiny.llama()
    veneer.preprocess_corda(again, settings)
    for path, product in products(veneer.get_peft_model(again, settings).bare).items():
        assert_close(found[path], product, **CLOSE)
    small = {"target_modules": ["q_proj"]}
    veneer.preprocess_corda(tiny.llama(), config(small, **{field: settings.corda_config.to_dict()[field]}))
    wide = config({"target_modules": ["q_proj", "up_proj"]}, **{field: settings.corda_config.to_dict()[field]})
    with pytest.raises(AdapterFileError, match="missing .*up_proj"):
        veneer.preprocess_corda(tiny.llama(), wide)


@pytest.mark.parametrize("field", ["cache_file", "covariance_file"])
def test_peft_s_files_are_refused_and_can_be_converted(field, tmp_path):
    old, new = tmp_path / "kept.pt", tmp_path / "kept.safetensors"
    theirs = made_by_peft(tiny.llama(), FIELDS, **{field: str(old)})
    with pytest.raises(AdapterFileError, match="is a pickle .PEFT writes such files"):
        veneer.preprocess_corda(tiny.llama(), config(**{field: str(old)}))
    save_file({name: tensor.contiguous() for name, tensor in torch.load(old, weights_only=True).items()}, new)
    base, settings = tiny.llama(), config(**{field: str(new)})
    veneer.preprocess_corda(base, settings)
    found = products(veneer.get_peft_model(base, settings).bare)
    for path, product in their_products(theirs).items():
        assert_close(found[path], product, **CLOSE)


def test_a_cache_that_does_not_fit(tmp_path):
    file = tmp_path / "kept.safetensors"
    base = tiny.llama()
    veneer.preprocess_corda(base, config(cache_file=str(file)), samples(base))
    with pytest.raises(AdapterFileError, match="written with 'ipm', 'kpm' is wanted"):
        veneer.preprocess_corda(tiny.llama(), config(cache_file=str(file), corda_method="kpm"))
    with pytest.raises(AdapterFileError, match="wrong shape .*S_WC .3., .2. is wanted"):
        veneer.preprocess_corda(tiny.llama(), config({"r": 2}, cache_file=str(file)))
    other = tiny.llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.normal_()
    veneer.preprocess_corda(other, config(cache_file=str(file)))
    with pytest.raises(ConfigError, match="layers.1.mlp.down_proj: .*belongs to other weights"):
        veneer.get_peft_model(other, config(cache_file=str(file)))
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    veneer.preprocess_corda(base, config(cache_file=str(file)))
    with pytest.raises(ConfigError, match="NaN"):
        veneer.get_peft_model(base, config(cache_file=str(file)))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterFileError, match="cut off"):
        veneer.preprocess_corda(tiny.llama(), config(cache_file=str(file)))


def test_half_precision_covariances_are_nearly_the_same():
    found = []
    for half in (False, True):
        base, settings = tiny.llama(), config(use_float16_for_covariance=half)
        veneer.preprocess_corda(base, settings, samples(base))
        found.append(products(veneer.get_peft_model(base, settings).bare))
    for path, product in found[0].items():
        assert not torch.equal(found[1][path], product)
        assert (found[1][path] - product).norm() < 0.2 * product.norm()


def test_what_was_measured_is_forgotten_unless_it_is_to_stay():
    for prune in (True, False):
        settings = config(prune_temporary_fields=prune, verbose=True)
        base = tiny.llama()
        veneer.preprocess_corda(base, settings, samples(base))
        model = veneer.get_peft_model(base, settings)
        if prune:
            with pytest.raises(ConfigError, match="call preprocess_corda"):
                model.add_adapter("second", settings)
        else:
            model.add_adapter("second", settings)


def test_calls_that_cannot_be_right():
    base = tiny.llama()
    with pytest.raises(ConfigError, match="needs run_model"):
        veneer.preprocess_corda(base, config())
    with pytest.raises(ConfigError, match="the config says True"):
        veneer.preprocess_corda(base, veneer.LoraConfig(**FIELDS), samples(base))
    with pytest.raises(ConfigError, match="run_model was not enough(.|\n)*q_proj: No inputs were seen"):
        veneer.preprocess_corda(base, config(), lambda: None)
    with pytest.raises(veneer.errors.VeneerError, match="embed_tokens"):
        veneer.preprocess_corda(base, config({"target_modules": ["embed_tokens"]}), samples(base))
    with pytest.raises(ConfigError, match="call preprocess_corda"):
        veneer.get_peft_model(base, config())
    veneer.preprocess_corda(base, config(), samples(base))
    with pytest.raises(ConfigError, match="2 layer.s. were not measured(.|\n)*layers.0.mlp.up_proj"):
        veneer.get_peft_model(base, config({"target_modules": ["q_proj", "up_proj"]}))
    veneer.get_peft_model(base, config())


def test_a_failing_run_leaves_nothing_behind():
    base = tiny.llama().train()

    def run():
        base(tiny.ids())
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        veneer.preprocess_corda(base, config(), run)
    assert base.training
    assert not any(module._forward_pre_hooks for module in base.modules())
    with pytest.raises(ConfigError, match="call preprocess_corda"):
        veneer.get_peft_model(base, config())

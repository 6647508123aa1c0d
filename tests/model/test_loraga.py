"""LoRA-GA from the whole model's own gradients, against PEFT's flow; its file, and what is refused."""

import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig as TheirLoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.errors import AdapterFileError, ConfigError
from veneer.model.overlay import adapters_by_site

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
FIELDS = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
GPT2 = {**FIELDS, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def config(fields=None, **settings):
    return veneer.LoraConfig(**{**FIELDS, **(fields or {})}, init_lora_weights="lora_ga", lora_ga_config=settings)


def steps(model, count=3):
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 64, (4, 8), generator=generator) for _ in range(count)]

    def step():
        for ids in rows:
            (50 * model(input_ids=ids, labels=ids).loss).backward()

    return step


def answer(model):
    with torch.no_grad():
        return model(tiny.ids()).logits


def made_by_peft(base, fields, *, cache_file=None, **settings):
    theirs = peft.LoraConfig(**fields, init_lora_weights="lora_ga", lora_ga_config=TheirLoraGAConfig(**settings))
    oracle.quietly(preprocess_loraga, base, theirs, steps(base), cache_file=cache_file)
    torch.manual_seed(0)
    return oracle.quietly(peft.get_peft_model, base, theirs).eval()


@pytest.mark.parametrize(
    ("make", "fields", "settings"),
    [
        (tiny.llama, FIELDS, {}),
        (tiny.llama, FIELDS, {"direction": "ArBr", "scale": "weight_svd"}),
        (tiny.gpt2, GPT2, {"direction": "A2rBr", "scale": "gd_scale"}),
        (tiny.gpt2, GPT2, {}),
    ],
)
def test_it_starts_as_peft_s_does(make, fields, settings, tmp_path):
    base = make()
    veneer.preprocess_loraga(base, config(fields, **settings), steps(base))
    ours = veneer.get_peft_model(base, config(fields, **settings), generator=torch.Generator().manual_seed(0))
    theirs = made_by_peft(make(), fields, **settings)
    reference = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert reference.keys() == {site.path for site, _ in adapters_by_site(ours.bare, "default")}
    for site, adapter in adapters_by_site(ours.bare, "default"):
        layer = reference[site.path]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if make is tiny.gpt2 and not settings:  # PEFT takes the rows of a Conv1D, its inputs, for outputs
            B = B * (site.shape[0] / site.shape[1]) ** 0.25
        for one, other in ((adapter.lora_A, A), (adapter.lora_B.T, B.T)):
            signs = (one * other).sum(1, keepdim=True).sign()  # of singular vectors, which are arbitrary
            assert (one * signs - other).norm() < 5e-2 * other.norm()  # both by random projections
    assert_close(answer(ours), answer(make()), rtol=1e-4, atol=1e-5)
    tiny.shake(ours)
    ours.save_pretrained(tmp_path)
    assert_close(answer(oracle.read_by_peft(make(), tmp_path).eval()), answer(ours), **CLOSE)
    assert torch.equal(answer(ours.unload()), answer(make()))


def test_gradients_go_by_one_at_a_time_and_all_is_as_before():
    base = tiny.llama()
    base.model.norm.weight.requires_grad_(False)
    base.lm_head.weight.grad = torch.ones_like(base.lm_head.weight)
    kept = base.lm_head.weight.grad
    wanted = {name: p.requires_grad for name, p in base.named_parameters()}
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    inner = steps(base, 1)

    def step():
        assert base.training
        inner()
        assert all(p.grad is None for p in base.parameters())

    veneer.preprocess_loraga(base, config(), step)
    assert {name: p.requires_grad for name, p in base.named_parameters()} == wanted
    assert base.lm_head.weight.grad is kept
    assert all(p.grad is None for p in base.parameters() if p is not base.lm_head.weight)
    assert not any(p._post_accumulate_grad_hooks for p in base.parameters())
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert not base.training


def test_the_mean_is_over_batches_and_buffers_are_kept():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
    data = [torch.randn(10, 6) for _ in range(3)]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    settings = veneer.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="lora_ga")
    veneer.preprocess_loraga(base, settings, lambda: [base(x).square().mean().backward() for x in data])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    gradients = []
    for x in data:
        base.zero_grad()
        base.train()(x).square().mean().backward()
        gradients.append(base[2].weight.grad.clone())
    _, found = vars(base)["_veneer_statistics"]
    assert_close(found["2"], torch.stack(gradients).mean(0))


def test_beside_other_adapters():
    model = tiny.shake(veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS)))
    expected = answer(model)
    veneer.preprocess_loraga(model, config(), steps(model))
    assert torch.equal(answer(model), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    model.add_adapter("second", config())
    model.set_adapter("second")
    assert_close(answer(model), answer(tiny.llama()), rtol=1e-4, atol=1e-5)


def test_a_file_is_written_once_and_read_afterwards(tmp_path):
    file, old, new = (str(tmp_path / "deep" / name) for name in ("ga.safetensors", "ga.pt", "converted.safetensors"))
    base = tiny.gpt2()
    veneer.preprocess_loraga(base, config(GPT2), steps(base), file)
    again = tiny.gpt2()
    veneer.preprocess_loraga(again, config(GPT2), pytest.fail, file)
    _, found = vars(again)["_veneer_statistics"]
    _, expected = vars(base)["_veneer_statistics"]
    made_by_peft(tiny.gpt2(), GPT2, cache_file=old)
    with pytest.raises(AdapterFileError, match="is a pickle"):
        veneer.preprocess_loraga(tiny.gpt2(), config(GPT2), pytest.fail, old)
    save_file({name: tensor.contiguous() for name, tensor in torch.load(old, weights_only=True).items()}, new)
    converted = tiny.gpt2()
    veneer.preprocess_loraga(converted, config(GPT2), pytest.fail, new)
    _, theirs = vars(converted)["_veneer_statistics"]
    for path, gradient in expected.items():
        assert torch.equal(found[path], gradient)
        assert_close(theirs[path], gradient, rtol=1e-4, atol=1e-6)
    with pytest.raises(AdapterFileError, match="missing"):
        veneer.preprocess_loraga(tiny.llama(), config(), pytest.fail, file)


def test_calls_that_cannot_be_right():
    base = tiny.llama()
    with pytest.raises(ConfigError, match="the config says 'pissa'"):
        veneer.preprocess_loraga(base, veneer.LoraConfig(**FIELDS, init_lora_weights="pissa"), steps(base))
    with pytest.raises(ConfigError, match="train_step was not enough(.|\n)*No gradient was seen"):
        veneer.preprocess_loraga(base, config(), lambda: base(tiny.ids()))
    with pytest.raises(ConfigError, match="down_proj: A gradient is NaN"):
        veneer.preprocess_loraga(base, config(), lambda: (base(tiny.ids()).logits.sum() * float("nan")).backward())
    with pytest.raises(ConfigError, match="call preprocess_loraga"):
        veneer.get_peft_model(base, config())
    assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in base.parameters())
    veneer.preprocess_loraga(base, config({"target_modules": ["q_proj"]}), steps(base))
    with pytest.raises(ConfigError, match="were not measured"):
        veneer.get_peft_model(base, config())


def test_convolutions():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5))
    x = torch.randn(6, 4, 4, 4)
    expected = base(x)
    settings = veneer.LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights="lora_ga")
    veneer.preprocess_loraga(base, settings, lambda: base(x).square().mean().backward())
    _, found = vars(base)["_veneer_statistics"]
    base(x).square().mean().backward()
    assert_close(found["0"], base[0].weight.grad.flatten(1))
    assert_close(veneer.get_peft_model(base, settings)(x), expected, rtol=1e-4, atol=1e-5)
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ConfigError, match="grouped convolutions:\n  0"):
        veneer.preprocess_loraga(grouped, settings.changed(target_modules=["0"]), pytest.fail)

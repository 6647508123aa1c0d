"""convert_to_lora and save_as_lora: against PEFT's, and against what the adapter itself does to the weights."""

import copy

import peft
import pytest
import torch
from torch import nn

from parity.oracle import made_by_peft, quietly, read_by_peft, save
from tiny import Stack, bert, gpt2, ids, llama, shake
from veneer import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from veneer.errors import AdapterNameError, ConfigError, MergeError
from veneer.layers.attach import adapter_on

LAYERS = {"target_modules": ["first", "second"]}


def adapted(base: nn.Module, **fields):
    return shake(get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **fields}))).eval()


def logits(model, x) -> torch.Tensor:
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.parametrize("rank", [2, 4, 7, 0.7, 1.0])
@pytest.mark.parametrize(("build", "targets"), [(llama, ["q_proj", "v_proj", "down_proj"]), (gpt2, ["c_attn"])])
def test_its_updates_are_peft_s(build, targets, rank, tmp_path):
    base = build()
    theirs = made_by_peft(base, r=4, lora_alpha=6, target_modules=targets)
    shake(theirs)
    ours = PeftModel.from_pretrained(copy.deepcopy(base), save(theirs, tmp_path))
    expected_config, expected = quietly(peft.convert_to_lora, theirs, rank)
    config, found = convert_to_lora(ours, rank)
    assert found.keys() == expected.keys()
    for key in [key for key in found if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        if rank not in (7, 1.0):  # where PEFT's factors hold rounding noise beyond the rank there is
            assert found[key].shape == expected[key].shape
        assert torch.allclose(found[other] @ found[key], expected[other] @ expected[key], atol=1e-5)
    if isinstance(rank, int):
        assert (config.r, config.lora_alpha) == (expected_config.r, expected_config.lora_alpha)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"target_modules": ["tokens", "first"], "use_dora": True},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_with_all_of_the_rank_it_does_the_same(fields, tmp_path):
    model = adapted(Stack(), **{**LAYERS, **fields})
    found = save_as_lora(tmp_path, model, 16)
    assert found.error < 1e-5
    assert not found.config.use_dora
    assert not found.config.use_rslora
    expected = logits(model, ids(20))
    assert torch.allclose(logits(PeftModel.from_pretrained(Stack(), tmp_path), ids(20)), expected, atol=1e-5)
    assert torch.allclose(logits(read_by_peft(Stack(), tmp_path), ids(20)), expected, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 0.6])
def test_the_errors_are_those_of_the_weights(use_dora, rank):
    model = adapted(Stack().double(), **LAYERS, use_dora=use_dora)
    found = save_errors(model, rank)
    for path, (error, A, B) in found.items():
        layer = model.get_base_model().get_submodule(path)
        W = layer._parameters["weight"]
        D = adapter_on(layer, "default").merged(W, W) - W
        assert error == pytest.approx(((D - B @ A).norm() / D.norm()).item(), rel=1e-9)
        S = torch.linalg.svdvals(D)
        assert error == pytest.approx((S[A.shape[0] :].norm() / S.norm()).item(), rel=1e-9)


def save_errors(model, rank) -> dict:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        found = save_as_lora(folder, model, rank)
    prefix = "base_model.model."
    return {
        fit.path: (
            fit.error,
            found.tensors[f"{prefix}{fit.path}.lora_A.weight"],
            found.tensors[f"{prefix}{fit.path}.lora_B.weight"],
        )
        for fit in found.layers
    }


def test_an_adapter_with_base_weights_of_its_own_is_refused():
    model = adapted(Stack(), **LAYERS, init_lora_weights="loftq")
    with pytest.raises(ConfigError, match="base weights of its own"):
        convert_to_lora(model, 4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_too(use_dora, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    model = adapted(copy.deepcopy(base), target_modules=["0"], use_dora=use_dora)
    found = save_as_lora(tmp_path, model, 6)
    assert found.error < 1e-5
    x = torch.randn(2, 4, 8, 8)
    assert torch.allclose(logits(read_by_peft(base, tmp_path), x), logits(model, x), atol=1e-5)


def test_a_head_of_a_classifier_comes_with_it(tmp_path):
    model = adapted(bert(), target_modules=["query", "value"], task_type="SEQ_CLS")
    save_as_lora(tmp_path, model, 4)
    theirs = read_by_peft(bert(), tmp_path)
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    assert torch.allclose(logits(theirs, ids()), logits(model, ids()), atol=1e-5)


def test_an_adapter_that_was_never_trained_becomes_zeros():
    model = get_peft_model(Stack(), LoraConfig(r=4, **LAYERS))
    config, tensors = convert_to_lora(model, 0.9)
    assert config.r == 1
    assert not any(value.any() for key, value in tensors.items() if "lora_B" in key)


def test_the_model_is_not_changed():
    model = adapted(Stack(), **LAYERS, modules_to_save=["head"])
    before = copy.deepcopy(model.state_dict())
    _, tensors = convert_to_lora(model, 2)
    for value in tensors.values():
        value.zero_()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_cannot_be_is_refused():
    model = adapted(Stack(), **LAYERS)
    with pytest.raises(AdapterNameError, match="did you mean 'default'"):
        convert_to_lora(model, 2, "defualt")
    with pytest.raises(AdapterNameError, match="no adapter"):
        convert_to_lora(Stack(), 2)
    with pytest.raises(ConfigError, match=r"first: 24 x 16 can have rank 16 at most"):
        convert_to_lora(model, 17)
    with pytest.raises(ConfigError, match="at least 1"):
        convert_to_lora(model, 0)
    with pytest.raises(ConfigError, match="nothing here is compiled"):
        convert_to_lora(model, 2, compile_kwargs={"mode": "max-autotune"})
    model.merge_adapter()
    with pytest.raises(MergeError, match="Unmerge default first"):
        convert_to_lora(model, 2)

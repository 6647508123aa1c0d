"""EVA from the whole model's own inputs: PEFT's ranks and factors, and a model that is never half initialised."""

import copy
import json
import pickle

import peft
import pytest
import torch
from peft.tuners.lora.config import EvaConfig as TheirEvaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from parity import oracle
from veneer.errors import AdapterNameError, AttachError, ConfigError, MergeError, VeneerWarning
from veneer.integrations import transformers as in_place
from veneer.model.tensors import adapter_tensors

TIGHT = {"rtol": 1e-3, "atol": 1e-3}  # PEFT decomposes in float32
FIELDS = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}
GPT2 = {**FIELDS, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
APART = ["q_proj", "up_proj", "down_proj"]  # no two share their input
EVA = {"tau": 0.9, "rho": 2.0}
QUIET = {"show_progress_bar": False}


def batches(count=4, rows=8, tokens=12, vocabulary=64):
    generator = torch.Generator().manual_seed(11)
    found = []
    for _ in range(count):
        ids = torch.randint(1, vocabulary, (rows, tokens), generator=generator)
        attended = torch.ones_like(ids)
        attended[0, :3] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        found.append({"input_ids": ids, "attention_mask": attended, "labels": labels})
    return found


def varied(base):
    """A model whose inputs have components far apart, so that ranks and directions do not hang on rounding."""
    with torch.no_grad():
        for embedding in (module for module in base.modules() if isinstance(module, nn.Embedding)):
            embedding.weight *= 8 * 0.7 ** torch.arange(embedding.embedding_dim)
    return base


def llama():
    return varied(tiny.llama())


def gpt2():
    return varied(tiny.gpt2())


def waiting(base=None, eva=EVA, **fields):
    config = veneer.LoraConfig(**{**FIELDS, **fields}, init_lora_weights="eva", eva_config=eva)
    return veneer.get_peft_model(base or llama(), config)


def initialised(base=None, eva=EVA, data=None, **fields):
    model = waiting(base, eva, **fields)
    veneer.initialize_lora_eva_weights(model, data or batches(), **QUIET)
    return model


def theirs(base, eva=EVA, **fields):
    fields = {**FIELDS, **fields}
    model = oracle.made_by_peft(base, **fields, init_lora_weights="eva", eva_config=TheirEvaConfig(**eva))
    oracle.quietly(peft.initialize_lora_eva_weights, model, batches(), **QUIET)
    return model


def answer(model):
    with torch.no_grad():
        return model(tiny.ids()).logits


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) <= 1  # the one that refuses training


@pytest.mark.parametrize(
    ("make", "fields", "eva"),
    [
        (llama, {}, EVA),
        (llama, {"use_dora": True}, {**EVA, "rho": 1.0}),
        (llama, {"target_modules": APART}, {**EVA, "whiten": True, "adjust_scaling_factors": False}),
        (gpt2, GPT2, EVA),
        (gpt2, GPT2, {**EVA, "whiten": True, "use_label_mask": False}),
    ],
)
def test_ranks_and_factors_are_peft_s(make, fields, eva):
    ours, reference = initialised(make(), eva, **fields), theirs(make(), eva, **fields)
    expected = oracle.values(reference)
    found = adapter_tensors(ours.bare, "default")
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}
    for key, value in expected.items():
        assert_close(found[key], value, **TIGHT)
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(ours.peft_config["default"], field) == getattr(reference.peft_config["default"], field)
    assert_close(answer(ours), answer(make()), rtol=1e-4, atol=1e-5)
    tiny.shake(ours)
    by_key = adapter_tensors(ours.bare, "default")
    oracle.quietly(peft.set_peft_model_state_dict, reference, by_key)
    assert_close(answer(ours), answer(reference.eval()), **TIGHT)


def test_a_layer_without_components_loses_its_adapter(tmp_path):
    wide = {"r": 1, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    ours, reference = initialised(eva={**EVA, "rho": 8.0}, **wide), theirs(llama(), {**EVA, "rho": 8.0}, **wide)
    expected = oracle.values(reference)
    assert adapter_tensors(ours.bare, "default").keys() == expected.keys()
    plain = [name for name, module in ours.bare.named_modules() if type(module) is nn.Linear and "proj" in name]
    assert len(plain) > 14 - 6  # more than what was no target
    tiny.shake(ours)
    ours.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(answer(again), answer(ours), rtol=1e-5, atol=1e-6)
    assert_close(answer(oracle.read_by_peft(llama(), tmp_path)), answer(ours), rtol=1e-4, atol=1e-5)
    assert torch.equal(answer(ours.unload()), answer(llama()))


@pytest.mark.parametrize("more", [{"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_saved_modules_and_biases_stay_with_the_adapter(more, tmp_path):
    model = initialised(gpt2(), {**EVA, "rho": 8.0}, **{**GPT2, "r": 1, **more})
    tiny.shake(model)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(gpt2(), tmp_path)
    assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-6)
    assert torch.equal(answer(model.unload()), answer(gpt2()))


def test_patterns_of_the_config_count_before():
    fields = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 4}, "use_rslora": True}
    ours, reference = initialised(**fields), theirs(llama(), **fields)
    config, expected = ours.peft_config["default"], reference.peft_config["default"]
    assert config.rank_pattern == expected.rank_pattern
    assert config.alpha_pattern == pytest.approx(expected.alpha_pattern)


def test_the_budget_is_kept_and_inputs_are_measured_once():
    calls = []

    def counting(layer_input, model_input, name):
        calls.append(name)
        return layer_input[0][model_input.T.unbind()]

    model = waiting()
    found = veneer.get_eva_state_dict(model, batches(), prepare_layer_inputs_fn=counting, **QUIET)
    assert sum(map(len, found.values())) == 3 * len(found) == 30
    later = set(calls[10:])
    assert any("q_proj" in name for name in later)
    assert not any("k_proj" in name or "v_proj" in name for name in later)


def test_masks():
    """Rows without a label, and padding, are as if they were not there."""
    data = batches()
    changed = copy.deepcopy(data)
    for batch in changed:
        batch["input_ids"][0, :3] = 7  # padding on the left, of rows that attend to nothing there
    ours = veneer.get_eva_state_dict(waiting(), data, **QUIET)
    same = veneer.get_eva_state_dict(waiting(), changed, **QUIET)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert_close(ours[name], same[name])
    everything = veneer.get_eva_state_dict(waiting(eva={**EVA, "use_label_mask": False}), data, **QUIET)
    assert everything[name].shape != ours[name].shape or not torch.allclose(everything[name], ours[name], atol=1e-3)


def test_layers_that_share_an_input_are_whitened_once():
    """PEFT whitens in place what they share: the second layer twice, the third three times."""
    plain = veneer.get_eva_state_dict(waiting(), batches(), **QUIET)
    white = veneer.get_eva_state_dict(waiting(eva={**EVA, "whiten": True}), batches(), **QUIET)
    q, k, v = (f"base_model.model.model.layers.1.self_attn.{name}_proj" for name in "qkv")
    for name in (k, v):
        rows = min(len(white[q]), len(white[name]))
        assert torch.equal(white[name][:rows], white[q][:rows])
    lengths = torch.linalg.vector_norm(white[q], dim=1, keepdim=True)
    assert_close(white[q] / lengths, plain[q], rtol=0, atol=1e-5)
    assert (lengths.diff(dim=0) > 0).all()  # the leading component is divided by most


def test_a_state_dict_can_be_exchanged_with_peft(tmp_path):
    fields = {**FIELDS, "target_modules": APART}
    reference = oracle.made_by_peft(
        llama(), **fields, init_lora_weights="eva", eva_config=TheirEvaConfig(**EVA, whiten=True)
    )
    from_peft = oracle.quietly(peft.get_eva_state_dict, reference, batches(), **QUIET)
    whitened = {**EVA, "whiten": True}
    model = waiting(eva=whitened, **fields)
    ours = veneer.get_eva_state_dict(model, batches(), **QUIET)
    assert ours.keys() == from_peft.keys()
    for name, value in from_peft.items():
        assert_close(ours[name], value, **TIGHT, check_dtype=False)
    save_file(ours, tmp_path / "eva.safetensors")
    oracle.quietly(peft.initialize_lora_eva_weights, reference, eva_state_dict=load_file(tmp_path / "eva.safetensors"))
    veneer.initialize_lora_eva_weights(model, eva_state_dict=from_peft)
    assert from_peft.keys() == ours.keys()  # PEFT empties the dict it is given
    found = adapter_tensors(model.bare, "default")
    for key, value in oracle.values(reference).items():
        assert_close(found[key], value, **TIGHT)


def test_measured_on_the_base_alone_and_used_later():
    base = llama()
    before = snapshot(base)
    config = veneer.LoraConfig(**FIELDS, init_lora_weights="eva", eva_config=EVA)
    found = veneer.get_eva_state_dict(base, batches(), config, **QUIET)
    assert_untouched(base, before)
    assert "model.layers.0.self_attn.q_proj" in found
    model = veneer.get_peft_model(base, config)
    veneer.initialize_lora_eva_weights(model, eva_state_dict=found)
    reference = adapter_tensors(initialised().bare, "default")
    for key, value in adapter_tensors(model.bare, "default").items():
        assert torch.equal(value, reference[key])


def test_the_model_runs_as_the_base_and_is_left_as_it_was():
    model = waiting()
    model.add_adapter("other", veneer.LoraConfig(**FIELDS))
    model.set_adapter("other")
    tiny.shake(model)
    before, expected = snapshot(model), answer(model)
    seen = []

    def forward(given, batch):
        assert given is model
        assert not given.training
        out = given(**batch)
        seen.append(out.logits)
        return out

    model.train()
    model.bare.lm_head.eval()
    veneer.get_eva_state_dict(model, batches(), forward_fn=forward, **QUIET)
    with torch.no_grad():
        assert torch.equal(seen[0], llama()(**batches()[0]).logits)
    assert model.bare.model.training
    assert not model.bare.lm_head.training
    assert_untouched(model, before)
    assert torch.equal(answer(model.eval()), expected)


def test_training_before_initialisation_is_refused():
    base = llama()
    config = veneer.LoraConfig(**FIELDS, init_lora_weights="eva")
    model = veneer.get_peft_model(base, config)
    model.train()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AttachError, match="was not given its data"):
            one(tiny.ids())
        answer(one)  # without gradients it is the base
        veneer.initialize_lora_eva_weights(one, batches(), **QUIET)
        one(tiny.ids()).logits.mean().backward()
        assert not any(module._forward_pre_hooks for module in one.modules())


def test_in_place_on_a_transformers_model(tmp_path):
    model = llama()
    in_place.add_adapter(model, veneer.LoraConfig(**FIELDS, init_lora_weights="eva", eva_config=EVA))
    model.train()
    with pytest.raises(AttachError, match="was not given its data"):
        model(tiny.ids())
    veneer.initialize_lora_eva_weights(model, batches(), **QUIET)
    model(tiny.ids()).logits.mean().backward()
    tiny.shake(model).eval()
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-6)


def test_other_adapters_and_files_may_be_trained(tmp_path):
    model = initialised()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == "eva"
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    loaded(tiny.ids()).logits.mean().backward()
    pending = waiting().train()
    pending.add_adapter("other", veneer.LoraConfig(**FIELDS))
    pending.set_adapter("other")
    pending(tiny.ids()).logits.mean().backward()
    pending.set_adapter("default")
    with pytest.raises(AttachError):
        pending(tiny.ids())
    with pytest.warns(VeneerWarning, match="was active"):
        pending.delete_adapter("default")
    assert not pending.bare._forward_pre_hooks


def test_embeddings_start_as_usual():
    model = waiting(target_modules=["embed_tokens", "q_proj"])
    before = adapter_tensors(model.bare, "default")["base_model.model.model.embed_tokens.lora_embedding_B"].clone()
    with pytest.warns(VeneerWarning, match="other.s. start as usual .model.embed_tokens"):
        veneer.initialize_lora_eva_weights(model, batches(), **QUIET)
    after = adapter_tensors(model.bare, "default")["base_model.model.model.embed_tokens.lora_embedding_B"]
    assert torch.equal(after, before)


def test_half_precision_adapters_stay_so():
    base = llama().to(torch.bfloat16)
    config = veneer.LoraConfig(**FIELDS, init_lora_weights="eva", eva_config=EVA)
    model = veneer.get_peft_model(base, config, autocast_adapter_dtype=False)
    veneer.initialize_lora_eva_weights(model, batches(), **QUIET)
    assert {value.dtype for value in adapter_tensors(model.bare, "default").values()} == {torch.bfloat16}


def test_batches_of_any_other_model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [torch.randn(40, 6) * torch.arange(1, 7) for _ in range(5)]
    config = veneer.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="eva", eva_config={"tau": 0.5})
    model = veneer.get_peft_model(base, config)
    with pytest.raises(ConfigError, match="looks for input_ids"):
        veneer.initialize_lora_eva_weights(model, data, forward_fn=lambda m, x: m(x), **QUIET)
    free = {"prepare_model_inputs_fn": None, "forward_fn": lambda m, x: m(x), **QUIET}
    with pytest.raises(ConfigError, match="names nothing, which EVA does not look at"):
        veneer.initialize_lora_eva_weights(model, data, prepare_layer_inputs_fn={"nothing": None}, **free)
    with pytest.raises(ConfigError, match="must give rows of 6 features"):
        veneer.initialize_lora_eva_weights(model, data, prepare_layer_inputs_fn=lambda x, *_: x[0][None], **free)
    veneer.initialize_lora_eva_weights(model, data, prepare_layer_inputs_fn=None, **free)
    A = adapter_tensors(model.bare, "default")["base_model.model.0.lora_A.weight"]
    rows = torch.cat(data[:2])
    leading = torch.linalg.svd(rows - rows.mean(0)).Vh[: len(A)]
    assert ((A * leading).sum(1).abs() > 0.9).all()


@pytest.mark.parametrize(
    ("data", "settings", "why"),
    [
        ([], {}, "dataloader is empty"),
        ((batch for batch in batches(1)), {}, "gone through only once"),
        (batches(1, rows=1, tokens=4), {}, "at most 1 rows in a batch, 6 components"),
        ([{"input_ids": tiny.ids(), "labels": torch.full((3, 7), -100)}], {}, "without a token that counts"),
        (batches(), {"max_batches": 1}, "not settled yet in"),
        (batches(), {"max_batches": 0}, "at least one batch"),
        ([{"input_ids": tiny.ids(), "labels": torch.zeros(3)}], {}, "a label for each token"),
        ([torch.ones(3)], {}, "looks for input_ids"),
    ],
)
def test_data_that_will_not_do(data, settings, why):
    model = waiting()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=why):
        veneer.initialize_lora_eva_weights(model, data, **QUIET, **settings)
    assert_untouched(model, before)
    assert model.bare._forward_pre_hooks


def test_a_failing_forward_leaves_nothing_behind():
    model = waiting().train()
    before = snapshot(model)

    def forward(given, batch):
        given(**batch)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        veneer.initialize_lora_eva_weights(model, batches(), forward_fn=forward, **QUIET)
    assert_untouched(model, before)
    assert model.bare.training


def test_calls_that_cannot_be_right():
    model, base = waiting(), llama()
    found = veneer.get_eva_state_dict(model, batches(), **QUIET)
    call = veneer.initialize_lora_eva_weights
    first = next(iter(found))
    with pytest.raises(ConfigError, match="give one of them"):
        call(model)
    with pytest.raises(ConfigError, match="give one of them"):
        call(model, batches(), found)
    with pytest.raises(AdapterNameError, match="no adapter"):
        call(base, batches())
    with pytest.raises(AdapterNameError, match="no adapter 'other'"):
        call(model, batches(), adapter_name="other")
    with pytest.raises(ConfigError, match="needs peft_config"):
        veneer.get_eva_state_dict(base, batches())
    with pytest.raises(ConfigError, match="missing"):
        call(model, eva_state_dict={name: A for name, A in found.items() if name != first})
    with pytest.raises(ConfigError, match="not a layer"):
        call(model, eva_state_dict={**found, "nowhere": found[first]})
    with pytest.raises(ConfigError, match="rows of 32 features"):
        call(model, eva_state_dict={**found, first: torch.ones(2, 5)})
    with pytest.raises(ConfigError, match="no layer has a rank"):
        call(model, eva_state_dict={name: A[:0] for name, A in found.items()})
    model.merge_adapter()
    with pytest.raises(MergeError, match="Unmerge"):
        call(model, eva_state_dict=found)
    model.unmerge_adapter()
    model.add_adapter("plain", veneer.LoraConfig(**FIELDS))
    with pytest.raises(ConfigError, match="made with init_lora_weights=True"):
        call(model, eva_state_dict=found, adapter_name="plain")
    call(model, eva_state_dict=found)

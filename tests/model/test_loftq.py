"""LoftQ over a base that was quantised by somebody else: factors from the original weights, read one by one."""

import copy
import json

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import tiny
import veneer
from veneer.errors import AdapterFileError, AdapterNameError, ConfigError, MergeError
from veneer.init.quantisers import normal_float
from veneer.model.overlay import adapters_by_site
from veneer.model.tensors import adapter_tensors

FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
GPT2 = {**FIELDS, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def quantised(base, names=("q_proj", "down_proj", "c_attn", "c_fc")):
    """The model with the values that 4 bits leave of some weights."""
    base = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(tuple(f"{one}.weight" for one in names)):
                parameter.copy_(normal_float(parameter, 4))
    return base


def adapted(base, **fields):
    return veneer.get_peft_model(base, veneer.LoraConfig(**{**FIELDS, **fields}))


def values(model):
    return {key: value.clone() for key, value in adapter_tensors(model.bare, "default").items()}


def assert_same(model, expected):
    found = values(model)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def distance(model, original):
    """How far the answers are from those of the original model."""
    with torch.no_grad():
        return (model(tiny.ids()).logits - original(tiny.ids()).logits).norm()


@pytest.fixture
def original(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("make", "fields"), [(tiny.llama, {}), (tiny.gpt2, GPT2)])
def test_each_update_is_the_best_of_its_rank(make, fields, dora, tmp_path):
    base = make()
    base.save_pretrained(tmp_path)
    model = adapted(quantised(base), use_dora=dora, **fields)
    before = distance(model, base)
    veneer.replace_lora_weights_loftq(model, tmp_path)
    for site, adapter in adapters_by_site(model.bare, "default"):
        W, now = base.get_parameter(f"{site.path}.weight"), model.bare.get_parameter(f"{site.path}.weight")
        rest = site.kind.to_matrix(W - now).detach().double()
        U, S, Vh = torch.linalg.svd(rest, full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        delta = site.scale * (adapter.lora_B @ adapter.lora_A).detach()
        assert_close(delta.double(), best, rtol=1e-4, atol=1e-5)
        theirs = _low_rank_decomposition(rest.float(), reduced_rank=4)  # PEFT's, which forgets the scale
        assert_close(delta, theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-5)
    assert distance(model, base) < before
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(distance(merged, base), distance(model, base), rtol=1e-4, atol=1e-4)


def test_sharded_checkpoints_and_default_places(original):
    base, folder = original
    reference = adapted(quantised(base))
    veneer.replace_lora_weights_loftq(reference, folder / "model.safetensors")
    expected = values(reference)
    base.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    by_default = quantised(base)
    by_default.name_or_path = str(folder)
    for model, path in (
        (adapted(quantised(base)), folder / "shards"),
        (adapted(quantised(base)), folder / "shards" / "model.safetensors.index.json"),
        (adapted(quantised(base)), str(folder / "shards" / "model.safetensors")),  # as PEFT's callers say it
        (adapted(by_default), None),
    ):
        veneer.replace_lora_weights_loftq(model, path)
        assert_same(model, expected)


def test_names_with_or_without_the_model_s_prefix(original, tmp_path):
    base, folder = original
    bare = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(bare, tmp_path / "bare.safetensors")
    model = adapted(quantised(base))
    veneer.replace_lora_weights_loftq(model, tmp_path / "bare.safetensors")
    inner = adapted(quantised(base).model)
    veneer.replace_lora_weights_loftq(inner, folder)
    assert list(map(torch.Tensor.sum, values(model).values())) == list(map(torch.Tensor.sum, values(inner).values()))


def test_a_callback_keeps_what_helps(original):
    base, folder = original
    model = adapted(quantised(base), use_dora=True)
    start, seen, best = values(model), [], [distance(model, base)]

    def helps(given, path):
        assert given is model
        seen.append(path)
        now = distance(given, base)
        if now < best[0]:
            best[0] = now
            return True
        return False

    veneer.replace_lora_weights_loftq(model, folder, callback=helps)
    assert seen == [site.path for site, _ in adapters_by_site(model.bare, "default")]
    assert distance(model, base) == best[0]
    first = adapted(quantised(base), use_dora=True)
    start = values(first)
    veneer.replace_lora_weights_loftq(first, folder, callback=lambda _, path: path.endswith("0.self_attn.q_proj"))
    changed = {key for key, value in values(first).items() if not torch.equal(value, start[key])}
    assert changed
    assert all("layers.0.self_attn.q_proj" in key for key in changed)
    veneer.replace_lora_weights_loftq(first, folder)


def test_layers_that_lost_nothing_are_left_alone(original):
    base, folder = original
    model = adapted(quantised(base, ["down_proj"]))
    start = values(model)
    veneer.replace_lora_weights_loftq(model, folder)
    changed = {key for key, value in values(model).items() if not torch.equal(value, start[key])}
    assert changed
    assert all("down_proj" in key for key in changed)


def test_calls_that_cannot_be_right(original, tmp_path):
    base, folder = original
    model = adapted(quantised(base))
    start, call = values(model), veneer.replace_lora_weights_loftq
    with pytest.raises(AdapterNameError, match="no adapter 'other'"):
        call(model, folder, "other")
    with pytest.raises(AdapterFileError, match="give model_path"):
        call(model)
    with pytest.raises(AdapterFileError, match=r"no model.safetensors and no model.safetensors.index.json"):
        call(model, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="callback answered nothing"):
        call(model, folder, callback=lambda model, path: None)
    with pytest.raises(ZeroDivisionError):
        call(model, folder, callback=lambda model, path: "layers.1" in path and 1 / 0)
    with pytest.raises(ConfigError, match="No weight differs"):
        call(adapted(tiny.llama()), folder)
    with pytest.raises(ConfigError, match="takes its start off the base"):
        call(adapted(quantised(base), init_lora_weights="pissa"), folder)
    with pytest.raises(ConfigError, match="does not start from a matrix"):
        call(adapted(quantised(base), target_modules=["embed_tokens"]), folder)
    model.bare.name_or_path = "someone/never-downloaded"
    with pytest.raises(AdapterFileError, match="neither a folder nor in the hub's cache"):
        call(model)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "q_proj" not in name}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="missing .*q_proj"):
        call(model, tmp_path / "a.safetensors")
    save_file({name: value[:3].clone() for name, value in tensors.items()}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterFileError, match="wrong shape"):
        call(model, tmp_path / "b.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match="layers.1.self_attn.q_proj: there is NaN"):
        call(model, tmp_path / "c.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for table, why in (({"weight_map": {"x": "../x.safetensors"}}, "outside"), ({}, "cannot be read as an index")):
        index.write_text(json.dumps(table))
        with pytest.raises(AdapterFileError, match=why):
            call(model, index)
    assert_same(model, start)
    model.merge_adapter()
    with pytest.raises(MergeError, match="Unmerge"):
        call(model, folder)
    model.unmerge_adapter()
    model.add_adapter("second", veneer.LoraConfig(**FIELDS, init_lora_weights="loftq"))
    model.set_adapter("second")
    with pytest.raises(MergeError, match="call set_adapter.'default'. first"):
        call(model, folder)

"""Saving and loading adapters over a model: what is refused, and that a refusal changes nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import veneer
from veneer.errors import AdapterFileError, AdapterNameError, ConfigError, TargetError, VeneerWarning
from veneer.storage.header import read_header

FIELDS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.fixture
def folder(tmp_path):
    """An adapter on disk as PEFT would write it: without our checksum and notes."""
    model = tiny.shake(veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS)))
    model.save_pretrained(tmp_path / "a")
    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    return tmp_path / "a"


def edit_config(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def rename_all(old, new):
    def change(tensors):
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


DAMAGES = {
    "a tensor is missing": (lambda f: edit_weights(f, drop(KEY)), rf"missing +{KEY} \[16, 8\]"),
    "all keys are under another prefix": (
        lambda f: edit_weights(f, rename_all("base_model.model.", "other.")),
        "missing.*\n.*[\\s\\S]*not expected other.model.layers",
    ),
    "an extra tensor": (lambda f: edit_weights(f, put("extra", torch.ones(2))), r"not expected extra \[2\]"),
    "a key of the base": (
        lambda f: edit_weights(f, put("base_model.model.lm_head.weight", torch.ones(64, 32))),
        r"brings its own lm_head.weight \[64, 32\], which differs",
    ),
    "a base weight under the adapted layer": (
        lambda f: edit_weights(
            f, put("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", torch.ones(32, 32))
        ),
        "brings its own model.layers.0.self_attn.q_proj.weight",
    ),
    "a transposed factor": (
        lambda f: edit_weights(f, lambda t: t.update({KEY: t[KEY].T.contiguous()})),
        rf"wrong shape +{KEY} \[8, 16\], the model needs \[16, 8\]",
    ),
    "a NaN": (lambda f: edit_weights(f, lambda t: t[KEY].fill_(float("nan"))), f"NaN or infinity[\\s\\S]*{KEY}"),
    "an infinity": (lambda f: edit_weights(f, lambda t: t[KEY].fill_(float("inf"))), f"NaN or infinity[\\s\\S]*{KEY}"),
    "integers": (lambda f: edit_weights(f, lambda t: t.update({KEY: t[KEY].to(torch.int8)})), "is I8; adapters are"),
    "a cut-off file": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]),
        "is cut off: its tensors need",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"There is no {WEIGHTS} in .*; it holds README.md, {CONFIG}"),
    "a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "a pickle, which can run code when it is read",
    ),
    "another rank in the config": (lambda f: edit_config(f, r=4), "says r=4, .* holds rank 8"),
    "fewer targets in the config": (
        lambda f: edit_config(f, target_modules=["q_proj"]),
        "not expected base_model.model.model.layers.0.self_attn.v_proj",
    ),
    "more targets in the config": (
        lambda f: edit_config(f, target_modules=["q_proj", "v_proj", "o_proj"]),
        "missing +base_model.model.model.layers.0.self_attn.o_proj.lora_A",
    ),
    "DoRA without magnitudes": (lambda f: edit_config(f, use_dora=True), "missing .*lora_magnitude_vector"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(folder, damage):
    change, text = DAMAGES[damage]
    change(folder)
    base = tiny.llama()
    names, flags = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises(AdapterFileError, match=text):
        veneer.PeftModel.from_pretrained(base, folder)
    assert list(base.state_dict()) == names
    assert [p.requires_grad for p in base.parameters()] == flags
    assert all(map(torch.equal, base.state_dict().values(), tiny.llama().state_dict().values()))
    assert type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": "8"}, "r='8': must be an integer"),
        ({"use_rslora": "false"}, "use_rslora='false'"),
        ({"peft_type": "IA3"}, "only 'LORA' adapters can be used"),
        ({"r": 100_000_000}, "r=100000000: must be an integer from 1"),
        ({"r": 60_000}, "says r=60000, .* holds rank 8"),
        ({"init_lora_weights": "corda"}, "took off the base came from data or chance"),
        ({"kasa_config": {"beta": 1}}, "not available yet"),
        ({"lora_bias": True}, "missing .*lora_B.bias"),
        ({"lora_alpah": 64}, "unknown field, did you mean 'lora_alpha'"),
    ],
)
def test_a_config_that_is_wrong_is_refused(folder, changes, text):
    edit_config(folder, **changes)
    with pytest.raises((ConfigError, AdapterFileError), match=text):
        veneer.PeftModel.from_pretrained(tiny.llama(), folder)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_config_that_lacks_what_matters_is_refused(folder, field):
    data = json.loads((folder / CONFIG).read_text())
    del data[field]
    (folder / CONFIG).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=f"{field}: missing"):
        veneer.PeftModel.from_pretrained(tiny.llama(), folder)


@pytest.mark.parametrize("layers", [1, 4])
def test_an_adapter_of_another_depth_is_refused(folder, layers):
    with pytest.raises(AdapterFileError, match="does not fit this model"):
        veneer.PeftModel.from_pretrained(tiny.llama(layers=layers), folder)


def test_another_architecture_is_refused(folder):
    with pytest.raises(TargetError, match="q_proj"):
        veneer.PeftModel.from_pretrained(tiny.gpt2(), folder)


def test_edited_settings_are_noticed_in_files_of_ours(tmp_path):
    model = tiny.shake(veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS, lora_alpha=16)))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lora_alpha=32)
    with pytest.raises(AdapterFileError, match=r"lora_alpha: trained with 16, the config says 32"):
        veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    edit_config(tmp_path, lora_alpha=16, base_model_name_or_path="moved/elsewhere")
    veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_names_that_only_other_models_have_are_passed_over_when_loading(folder):
    """People list the names of several families; PEFT writes them all, and the tensors say what was trained."""
    expected = veneer.PeftModel.from_pretrained(tiny.llama(), folder)(tiny.ids()).logits
    edit_config(folder, target_modules=["q_proj", "v_proj", "query_key_value"], alpha_pattern={"c_attn": 2})
    with pytest.warns(
        VeneerWarning, match="2 settings do not fit .* passed over[\\s\\S]*query_key_value[\\s\\S]*c_attn"
    ):
        model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    assert torch.equal(model(tiny.ids()).logits, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_of_a_pattern_is_part_of_it(tmp_path, reverse):
    pattern = {"layers.0.self_attn.q_proj": 2, "q_proj": 4}
    model = tiny.shake(veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS, alpha_pattern=pattern)))
    model.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / CONFIG).read_text())["alpha_pattern"]) == list(pattern)
    if reverse:
        edit_config(tmp_path, alpha_pattern=dict(reversed(pattern.items())))
        with pytest.raises(AdapterFileError, match="alpha_pattern: trained with"):
            veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    else:
        again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
        assert torch.equal(again(tiny.ids()).logits, model(tiny.ids()).logits)


def test_a_config_edited_in_place_is_not_saved(tmp_path):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS, rank_pattern={"q_proj": 2}))
    model.peft_config["default"].rank_pattern["q_proj"] = 9
    with pytest.raises(ConfigError, match="rank_pattern was changed"):
        model.save_pretrained(tmp_path / "x")


def test_an_adapter_without_values_is_not_saved(tmp_path):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS)).to("meta")
    with pytest.raises(AdapterFileError, match="meta device") as caught:
        model.save_pretrained(tmp_path / "x")
    assert "q_proj.lora_A.weight" in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_what_shapes_a_base_checkpoint_may_be_said_and_changes_nothing(folder, tmp_path):
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    model.save_pretrained(tmp_path / "x", save_function=torch.save, max_shard_size="1GB")
    assert load_file(tmp_path / "x" / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()


def test_a_failed_load_leaves_the_other_adapters_alone(folder):
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    before = model(tiny.ids()).logits
    edit_weights(folder, drop(KEY))
    with pytest.raises(AdapterFileError):
        model.load_adapter(folder, "b")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert torch.equal(model(tiny.ids()).logits, before)


def test_loading_under_the_name_of_an_adapter_of_other_settings_is_refused(folder):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(r=3, target_modules=["o_proj"]))
    with pytest.raises(AdapterNameError, match="of other settings"):
        model.load_adapter(folder, "default")


def test_loading_takes_where_peft_puts_an_adapter_and_says_that_all_keys_fit(folder):
    places = {"torch_device": "cpu", "device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}, "offload_folder": "x"}
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder, **places)
    result = model.load_adapter(folder, "other", **places)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert model.load_adapter(folder, "other", device_map="auto").missing_keys == []
    with pytest.raises(AdapterFileError, match="Unknown option devcie_map"):
        model.load_adapter(folder, "third", devcie_map="auto")


def test_loading_leaves_what_was_frozen_of_other_adapters_frozen(folder):
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_A"):
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_adapter(folder, "other")
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after.pop(name) for name in before} == before
    assert after
    assert not any(after.values())


def test_loading_waits_until_it_is_chosen(folder):
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    model.load_adapter(folder, "b", is_trainable=True)
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("b")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}


def test_round_trip_is_the_identity(tmp_path):
    fields = {**FIELDS, "use_dora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 3}}
    model = tiny.shake(veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**fields)))
    model.save_pretrained(tmp_path / "a")
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path / "a", is_trainable=True)
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / CONFIG).read_bytes() == (tmp_path / "b" / CONFIG).read_bytes()
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_header(tmp_path / "a" / WEIGHTS).metadata == read_header(tmp_path / "b" / WEIGHTS).metadata


def test_a_name_goes_with_the_subfolder(tmp_path):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS))
    model.add_adapter("b", veneer.LoraConfig(**FIELDS, r=2))
    model.save_pretrained(tmp_path)
    assert veneer.LoraConfig.from_pretrained(tmp_path).r == 8
    assert veneer.LoraConfig.from_pretrained(tmp_path, subfolder="b").r == 2
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path, subfolder="b")
    assert again.active_peft_config.r == 2


def test_nothing_to_save_is_an_error(tmp_path):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS))
    model.merge_and_unload()
    with pytest.raises(AdapterNameError, match="has no adapter"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_broken_values_are_not_saved_over_good_ones(folder):
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_incomplete_values_are_not_saved(tmp_path):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS))
    with pytest.raises(AdapterFileError, match="incomplete"):
        model.save_pretrained(tmp_path / "x", state_dict={})
    assert not (tmp_path / "x").exists()


def test_other_files_of_the_folder_stay(folder):
    (folder / "README.md").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("1")
    (folder / "adapter_model.bin").write_bytes(b"old")
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text().endswith("---\n\nmine")
    assert (folder / "runs" / "log").read_text() == "1"
    assert not (folder / "adapter_model.bin").exists()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["a"]


def test_a_copied_adapter_is_found_wherever_it_lies(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    veneer.PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "elsewhere"))
    with pytest.raises(AdapterFileError, match="There is no folder"):
        veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path / "nowhere")


def test_an_adapter_saved_in_half_precision_loads_in_float32(folder):
    edit_weights(folder, lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}))
    model = veneer.PeftModel.from_pretrained(tiny.llama(dtype=torch.bfloat16), folder)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.adapters["default"].lora_A.dtype == torch.float32


def test_a_loaded_adapter_is_its_own_whatever_becomes_of_the_file(folder):
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    start = read_header(folder / WEIGHTS).data_start
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\0" * ((folder / WEIGHTS).stat().st_size - start))
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_adapter_given_by_its_values_does_not_share_them(folder):
    values = load_file(folder / WEIGHTS)
    config = veneer.LoraConfig.from_pretrained(folder)
    model = tiny.llama()
    veneer.inject_adapter_in_model(config, model, state_dict=values)
    before = model.model.layers[1].self_attn.v_proj.adapters["default"].lora_B.clone()
    for value in values.values():
        value.zero_()
    assert torch.equal(model.model.layers[1].self_attn.v_proj.adapters["default"].lora_B, before)


class Counted:
    """Calls of functions, by name."""

    def __init__(self, monkeypatch):
        self.calls, self.monkeypatch = {}, monkeypatch

    def watch(self, module, name):
        real = getattr(module, name)
        self.calls[name] = 0

        def counted(*args, **kwargs):
            self.calls[name] += 1
            return real(*args, **kwargs)

        self.monkeypatch.setattr(module, name, counted)


def test_loading_reads_the_file_once_and_initialises_nothing(folder, monkeypatch):
    from veneer.model import make
    from veneer.storage import adapter_file

    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    counted = Counted(monkeypatch)
    for module, name in ((adapter_file, "read_header"), (adapter_file, "read_values"), (make, "initialise")):
        counted.watch(module, name)
    for name in ("kaiming_uniform_", "normal_", "uniform_"):
        counted.watch(torch.nn.init, name)
    model.load_adapter(folder, "other")
    assert counted.calls.pop("read_header") == counted.calls.pop("read_values") == 1
    assert set(counted.calls.values()) == {0}


def test_loading_looks_at_the_model_once_and_swapping_by_the_same_settings_never(folder, tmp_path, monkeypatch):
    from veneer.model import files, plan
    from veneer.model.renamed import file
    from veneer.targets import match

    looks = []
    real = files.structure_of
    for module in (files, plan, file, match):
        monkeypatch.setattr(module, "structure_of", lambda model: looks.append(model) or real(model))
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
    assert len(looks) == 1
    model.load_adapter(folder, "other")
    assert len(looks) == 2
    veneer.hotswap_adapter(model, folder, "other")
    assert len(looks) == 2
    edit_config(folder, lora_alpha=3)
    veneer.hotswap_adapter(model, folder, "other")
    assert len(looks) == 3
    assert {site.alpha for site in model.bare._veneer_overlay.resolutions["other"].sites} == {3}


def test_a_layer_gets_its_adapter_without_an_assignment_that_torch_looks_at(folder, monkeypatch):
    base, seen = tiny.llama().eval(), []
    real = torch.nn.Module.__setattr__

    def noted(module, name, value):
        seen.append((type(module).__name__, name))
        real(module, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", noted)
    veneer.PeftModel.from_pretrained(base, folder)
    outside = {"PeftModelForCausalLM", "LoraModel"}
    inside = [(owner, name) for owner, name in seen if owner not in outside]
    assert set(inside) == {("Adapter", "training")}  # in evaluation, as its layer
    assert len(inside) == 4


def test_saving_flushes_three_files_and_two_folders_once_and_reads_weights_back_once(tmp_path, monkeypatch):
    import os

    from veneer.model import card
    from veneer.storage import adapter_file

    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS))
    counted = Counted(monkeypatch)
    counted.watch(os, "fsync")
    for module, name in (
        (adapter_file, "read_header"),
        (adapter_file, "read_values"),
        (card, "read_weights_header"),
    ):
        counted.watch(module, name)
    model.save_pretrained(tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert counted.calls == {"fsync": 5, "read_header": 1, "read_values": 1, "read_weights_header": 0}


def test_loading_and_saving_look_at_no_parameter_of_other_adapters(folder, tmp_path, monkeypatch):
    from veneer.model import files, tensors

    def seen(others):
        model = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
        for index in range(others):
            model.load_adapter(folder, f"other{index}")
        with monkeypatch.context() as patch:
            counted = Counted(patch)
            counted.watch(tensors, "_on_disk")
            counted.watch(files, "expected_tensors")
            model.save_pretrained(tmp_path / f"{others}", selected_adapters=["default"])
            model.load_adapter(folder, "last")
        return counted.calls

    assert seen(0) == seen(5)

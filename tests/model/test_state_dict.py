"""Adapters and base as dictionaries, against PEFT's."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import tiny
import veneer
from parity.oracle import made_by_peft, quietly, read_by_peft, values
from veneer.errors import AdapterFileError, AdapterNameError, ConfigError, MergeError, VeneerWarning

FIELDS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "use_dora": True}
PREFIX = "base_model.model."
KEY = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"
X = tiny.ids()


def ours(**fields) -> veneer.PeftModel:
    return veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**{**FIELDS, **fields}))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Of an adapter of PEFT's."""
    return {name: value.clone() for name, value in values(tiny.shake(made_by_peft(tiny.llama(), **FIELDS))).items()}


class TestGetting:
    def test_keys_and_shapes_are_pefts(self, state):
        mine = veneer.get_peft_model_state_dict(ours())
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in state.items()}

    def test_keys_and_shapes_with_biases_are_pefts(self):
        fields = {"r": 2, "target_modules": ["first", "tokens"], "bias": "all"}
        theirs = values(made_by_peft(tiny.Stack(), **fields))
        mine = veneer.get_peft_model_state_dict(veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(**fields)))
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}

    def test_in_place_without_the_prefix_as_pefts(self):
        fields = {"r": 2, "target_modules": ["q_proj"]}
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**fields), tiny.llama())
        mine = veneer.inject_adapter_in_model(veneer.LoraConfig(**fields), tiny.llama())
        assert veneer.get_peft_model_state_dict(mine).keys() == values(theirs).keys()

    def test_they_are_the_tensors_themselves(self):
        model = ours()
        veneer.get_peft_model_state_dict(model)[KEY].fill_(1)
        assert model.bare.model.layers[1].self_attn.v_proj.adapters["default"].lora_B.eq(1).all()

    def test_out_of_a_state_dict(self):
        model = tiny.shake(ours())
        gathered = {name: value.clone() for name, value in model.state_dict().items()}
        expected = {k: v.clone() for k, v in veneer.get_peft_model_state_dict(model).items()}
        tiny.shake(model, seed=9)
        found = veneer.get_peft_model_state_dict(model, gathered)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        with pytest.raises(AdapterFileError, match="lacks values of adapter 'default'[\\s\\S]*and 7 more"):
            veneer.get_peft_model_state_dict(model, {})

    def test_embeddings_if_asked_for_are_pefts(self):
        fields = {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}
        theirs = quietly(
            peft.get_peft_model_state_dict, made_by_peft(tiny.llama(), **fields), save_embedding_layers=True
        )
        model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**fields))
        mine = veneer.get_peft_model_state_dict(model, save_embedding_layers=True)
        assert set(theirs) - set(mine) == set()
        assert set(mine) - set(theirs) == {f"{PREFIX}lm_head.weight"}  # PEFT leaves out what is not targeted
        assert torch.equal(
            mine[f"{PREFIX}model.embed_tokens.base_layer.weight"], tiny.llama().model.embed_tokens.weight
        )

    def test_another_adapter_and_a_compiled_model(self):
        model = ours()
        model.add_adapter("b", veneer.LoraConfig(r=3, target_modules=["up_proj"]))
        found = veneer.get_peft_model_state_dict(
            torch.compile(model, backend="eager"), adapter_name="b", unwrap_compiled=True
        )
        assert [value.shape[0] for key, value in found.items() if "lora_A" in key] == [3, 3]
        with pytest.raises(AdapterNameError, match="no adapter 'c'"):
            veneer.get_peft_model_state_dict(model, adapter_name="c")
        with pytest.raises(ConfigError, match="save_embedding_layers='yes'"):
            veneer.get_peft_model_state_dict(model, save_embedding_layers="yes")


class TestSetting:
    @pytest.mark.parametrize("prefix", [True, False])
    @pytest.mark.parametrize("in_place", [True, False])
    def test_pefts_values(self, state, prefix, in_place):
        theirs = made_by_peft(tiny.llama(), **FIELDS)
        quietly(peft.set_peft_model_state_dict, theirs, state)
        if in_place:
            model = veneer.inject_adapter_in_model(veneer.LoraConfig(**FIELDS), tiny.llama()).eval()
        else:
            model = ours()
        given = state if prefix else {key.removeprefix(PREFIX): value for key, value in state.items()}
        result = veneer.set_peft_model_state_dict(model, given)
        assert result == ([], [])
        torch.testing.assert_close(model(X).logits, theirs(X).logits)

    def test_there_and_back(self):
        model, twin = tiny.shake(ours()), ours()
        veneer.set_peft_model_state_dict(twin, veneer.get_peft_model_state_dict(model))
        assert torch.equal(twin(X).logits, model(X).logits)

    def test_other_dtypes_are_converted(self, state):
        model = ours()
        veneer.set_peft_model_state_dict(model, {key: value.double() for key, value in state.items()})
        assert model(X).logits.dtype == torch.float32

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda s: s.pop(KEY), f"missing +{KEY}"),
            (lambda s: s.update({"extra": torch.ones(2)}), f"not expected {PREFIX}extra"),
            (lambda s: s.update({KEY: torch.ones(16, 3)}), rf"wrong shape +{KEY} \[16, 3\], the model needs \[16, 2\]"),
            (lambda s: s.update({KEY: torch.ones(16, 2).int()}), f"wrong dtype +{KEY} is torch.int32"),
            (lambda s: s[KEY].fill_(float("nan")), f"NaN or infinity in {KEY}"),
            (lambda s: s.update({f"{PREFIX}model.embed_tokens.weight": torch.ones(64, 32)}), "brings its own"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_changes_nothing(self, state, change, text):
        model = tiny.shake(ours())
        before = model(X).logits
        change(state)
        with pytest.raises(AdapterFileError, match=text):
            veneer.set_peft_model_state_dict(model, state)
        assert torch.equal(model(X).logits, before)

    def test_other_sizes_may_be_left_out_as_in_peft(self, state):
        model, theirs = ours(), made_by_peft(tiny.llama(), **FIELDS)
        state[KEY] = torch.ones(16, 3)
        with pytest.warns(VeneerWarning, match="ignore_mismatched_sizes=True"):
            result = veneer.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
        assert result == ([KEY], [])
        quietly(peft.set_peft_model_state_dict, theirs, state, ignore_mismatched_sizes=True)
        torch.testing.assert_close(model(X).logits, theirs(X).logits)

    def test_not_strict(self, state):
        model = ours()
        state.pop(KEY)
        state["extra"] = torch.ones(1)
        result = veneer.set_peft_model_state_dict(model, state, strict=False)
        assert result.missing_keys == [KEY]
        assert result.unexpected_keys == [f"{PREFIX}extra"]
        assert veneer.get_peft_model_state_dict(model)[KEY].eq(0).all()

    def test_a_merged_adapter_is_refused(self, state):
        model = ours()
        model.merge_adapter()
        with pytest.raises(MergeError, match="is merged"):
            veneer.set_peft_model_state_dict(model, state)


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path):
        tiny.shake(ours()).save_pretrained(tmp_path / "a")
        return tmp_path / "a"

    def test_as_pefts(self, folder):
        mine = veneer.load_peft_weights(folder)
        theirs = peft.load_peft_weights(str(folder), device="cpu")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        assert {value.device.type for value in mine.values()} == {"cpu"}
        assert {value.device.type for value in veneer.load_peft_weights(folder, device="meta").values()} == {"meta"}

    def test_renamed_as_by_peft(self, folder):
        mapping = {r"^model\.layers\.(\d+)": r"blocks.\1", "self_attn": "never"}
        mine = veneer.load_peft_weights(folder, key_mapping=mapping)
        assert mine.keys() == peft.load_peft_weights(str(folder), device="cpu", key_mapping=mapping).keys()
        assert f"{PREFIX}blocks.1.self_attn.v_proj.lora_B.weight" in mine
        with pytest.raises(AdapterFileError, match="two tensors one name"):
            veneer.load_peft_weights(folder, key_mapping={".*": "one"})

    def test_in_a_subfolder(self, folder):
        assert veneer.load_peft_weights(folder.parent, subfolder="a").keys() == veneer.load_peft_weights(folder).keys()

    def test_pickles_and_damage_are_refused(self, folder):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[KEY][0] = float("nan")
        save_file(tensors, file)
        with pytest.raises(AdapterFileError, match="NaN"):
            veneer.load_peft_weights(folder)
        file.rename(folder / "adapter_model.bin")
        with pytest.raises(AdapterFileError, match="a pickle"):
            veneer.load_peft_weights(folder)


class TestTheBase:
    def test_its_own_keys_and_values_whatever_acts(self):
        model = tiny.shake(veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"], bias="all")))
        base = tiny.Stack().state_dict()
        for _ in range(2):
            found = veneer.get_base_model_state_dict(model)
            assert list(found) == list(base)
            assert all(torch.equal(found[key], base[key]) for key in base)
            model.merge_adapter()
            model.disable_adapter_layers()
            model.enable_adapter_layers()
        theirs = quietly(peft.get_base_model_state_dict, made_by_peft(tiny.Stack(), target_modules=["first"]))
        assert set(theirs) == set(found)

    def test_trained_rows_are_not_the_bases(self):
        config = veneer.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
        model = tiny.shake(veneer.get_peft_model(tiny.llama(), config))
        found, base = veneer.get_base_model_state_dict(model), tiny.llama().state_dict()
        assert list(found) == list(base)
        assert all(torch.equal(found[key], base[key]) for key in base)

    def test_new_values_under_the_adapter(self):
        model = tiny.shake(ours(use_dora=False))
        new = {key: value + 0.01 for key, value in tiny.llama().state_dict().items()}
        assert veneer.set_base_model_state_dict(model, new) == ([], [])
        other = tiny.llama()
        other.load_state_dict(new)
        expected = veneer.get_peft_model(other, veneer.LoraConfig(**{**FIELDS, "use_dora": False}))
        veneer.set_peft_model_state_dict(expected, veneer.get_peft_model_state_dict(model))
        assert torch.equal(model(X).logits, expected(X).logits)
        with model.disable_adapter():
            plain = tiny.llama()
            plain.load_state_dict(new)
            assert torch.equal(model(X).logits, plain(X).logits)

    def test_what_does_not_fit(self):
        model, base = ours(), tiny.llama().state_dict()
        base["extra"] = base.pop("lm_head.weight")
        with pytest.raises(AdapterFileError, match="missing +lm_head.weight\n +not expected extra"):
            veneer.set_base_model_state_dict(model, base)
        assert veneer.set_base_model_state_dict(model, base, strict=False) == (["lm_head.weight"], ["extra"])
        base["model.norm.weight"] = torch.ones(3)
        with pytest.raises(AdapterFileError, match=r"wrong shape +model.norm.weight \[3\]"):
            veneer.set_base_model_state_dict(model, base, strict=False)


class TestInjecting:
    def test_the_model_itself_comes_back(self, tmp_path):
        base = tiny.llama()
        config = veneer.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        assert veneer.inject_adapter_in_model(config, base) is base
        assert not torch.equal(base(X).logits, tiny.llama()(X).logits)
        base.save_pretrained(tmp_path)  # the base, as if there were no adapter
        saved, plain = load_file(tmp_path / "model.safetensors"), tiny.llama().state_dict()
        assert saved.keys() == plain.keys()
        assert all(torch.equal(saved[key], plain[key]) for key in plain)

    def test_the_new_adapter_acts_as_in_peft(self):
        base = veneer.inject_adapter_in_model(veneer.LoraConfig(target_modules=["q_proj"]), tiny.llama(), "a")
        veneer.inject_adapter_in_model(veneer.LoraConfig(target_modules=["v_proj"]), base, "b")
        assert veneer.get_model_status(base).active_adapters == ["b"]
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), tiny.llama(), "a")
        quietly(peft.inject_adapter_in_model, peft.LoraConfig(target_modules=["v_proj"]), theirs, "b")
        assert peft.get_model_status(theirs).active_adapters == ["b"]

    @pytest.mark.parametrize("prefix", ["", PREFIX])
    def test_keys_decide_the_targets(self, prefix):
        config = veneer.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0])
        names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]
        state = {f"{prefix}{name}.lora_{part}.weight": torch.zeros(1) for name in names for part in "AB"}
        with pytest.warns(VeneerWarning, match="target_modules means 1 layers and state_dict names 2; 0 are the same"):
            model = veneer.inject_adapter_in_model(config, tiny.llama(), state_dict=state)
        assert [layer.name for layer in veneer.get_layer_status(model)] == names
        if not prefix:
            theirs = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0])
            other = quietly(peft.inject_adapter_in_model, theirs, tiny.llama(), state_dict=state)
            assert [layer.name for layer in peft.get_layer_status(other)] == names

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_compiled_model_is_adapted_inside(self):
        config = veneer.LoraConfig(r=2, target_modules=["q_proj"])
        state = veneer.get_peft_model_state_dict(veneer.inject_adapter_in_model(config, tiny.llama()))
        compiled = torch.compile(tiny.llama())
        assert veneer.inject_adapter_in_model(config, compiled, state_dict=state) is compiled
        assert veneer.get_peft_model_state_dict(compiled).keys() == state.keys()

    def test_keys_that_agree_with_the_config(self):
        model = tiny.shake(ours(modules_to_save=None))
        state = veneer.get_peft_model_state_dict(model)
        config = veneer.LoraConfig(**{**FIELDS, "modules_to_save": None})
        twin = veneer.inject_adapter_in_model(config, tiny.llama(), state_dict=state)
        veneer.set_peft_model_state_dict(twin, state)
        assert torch.equal(twin(X).logits, model(X).logits)

    @pytest.mark.parametrize(
        ("state", "text"),
        [
            ({"model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(1)}, "does not have:\n +model.layers.7"),
            ({"lm_head.weight": torch.ones(1)}, "No key of state_dict names a layer"),
        ],
    )
    def test_keys_that_do_not_fit(self, state, text):
        base = tiny.llama()
        with pytest.raises(ValueError, match=text):
            veneer.inject_adapter_in_model(veneer.LoraConfig(target_modules=["q_proj"]), base, state_dict=state)
        assert list(base.state_dict()) == list(tiny.llama().state_dict())

    def test_a_facade_is_refused(self):
        with pytest.raises(RuntimeError, match="call its add_adapter"):
            veneer.inject_adapter_in_model(veneer.LoraConfig(), ours())

    def test_what_it_made_is_read_by_peft(self, tmp_path):
        config = veneer.LoraConfig(**FIELDS)
        model = tiny.shake(veneer.inject_adapter_in_model(config, tiny.llama()))
        state = veneer.get_peft_model_state_dict(model)
        save_file(
            {f"{PREFIX}{key}": value.contiguous() for key, value in state.items()},
            tmp_path / "adapter_model.safetensors",
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps(model.peft_config["default"].to_dict()))
        torch.testing.assert_close(model(X).logits, read_by_peft(tiny.llama(), tmp_path)(X).logits)


@pytest.mark.parametrize("fields", [{"target_modules": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_tied_values_that_differ_are_refused(fields):
    fields = {"target_modules": ["q_proj"], **fields, "ensure_weight_tying": True}
    model = tiny.shake(veneer.get_peft_model(tiny.llama(tied=True), veneer.LoraConfig(**fields)))
    before = {key: value.clone() for key, value in veneer.get_peft_model_state_dict(model).items()}
    head = next(key for key in before if "lm_head" in key)
    with pytest.raises(AdapterFileError, match="tied to .*embed_tokens.*, and differs from it: .*lm_head"):
        veneer.set_peft_model_state_dict(model, {**before, head: before[head] + 1})
    assert_close(veneer.get_peft_model_state_dict(model), before, rtol=0, atol=0)


def test_eight_bit_floats_are_refused_by_name():
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(target_modules=["q_proj"]))
    given = dict(veneer.get_peft_model_state_dict(model))
    key = next(iter(given))
    with pytest.raises(AdapterFileError, match="wrong dtype .*lora_A.weight is torch.float8_e4m3fn"):
        veneer.set_peft_model_state_dict(model, {**given, key: given[key].to(torch.float8_e4m3fn)})

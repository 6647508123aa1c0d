"""The methods of a transformers model with adapters in place: transformers' own names, arguments and results."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.integrations.peft import PeftAdapterMixin
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

import tiny
import veneer
from veneer.errors import AdapterFileError, AdapterNameError, ArgumentError, AttachError, ConfigError, MergeError
from veneer.integrations.adapted_model import AdaptedModel


def config(r=4, **options):
    return veneer.LoraConfig(
        r=r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **options
    )


def adapted(names=("default",), **options):
    model = tiny.llama()
    for at, name in enumerate(names):
        veneer.add_adapter(model, config(**options), name, generator=torch.Generator().manual_seed(at))
    return model


def logits(model):
    return model(tiny.ids()).logits


@pytest.fixture
def folders(tmp_path):
    """One folder for each of the adapters a (rank 4) and b (rank 2), and what the model computes with each."""
    outputs = {}
    for at, (name, rank) in enumerate([("a", 4), ("b", 2)]):
        model = adapted((name,), r=rank, lora_alpha=3 + at)
        tiny.shake(model, seed=at)
        model.save_pretrained(tmp_path / name)
        outputs[name] = logits(model)
    return tmp_path, outputs


METHODS = [
    name for name, value in vars(PeftAdapterMixin).items() if inspect.isfunction(value) and not name.startswith("_")
]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_what_transformers_own_takes(name):
    theirs = inspect.signature(getattr(PeftAdapterMixin, name)).parameters
    ours = inspect.signature(vars(AdaptedModel)[name]).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]


class TestWhatActs:
    def test_the_adapter_added_last(self):
        model = adapted(("a", "b"))
        assert model.active_adapters() == ["b"]
        assert list(model.peft_config) == ["a", "b"]
        assert all(p.requires_grad == ("b" in name.split(".")) for name, p in model.named_parameters())

    def test_the_adapter_loaded_last(self, folders):
        folder, outputs = folders
        model = tiny.llama().train()
        for name in ("a", "b"):
            assert isinstance(model := model, LlamaForCausalLM)
            veneer.load_adapter(model, folder / name, name)
            assert not model.training
            assert model.active_adapters() == [name]
            assert torch.equal(logits(model), outputs[name])
        assert not any(p.requires_grad for p in model.parameters())
        model.set_adapter("a")
        assert torch.equal(logits(model), outputs["a"])
        assert not any(p.requires_grad for p in model.parameters())

    def test_several_and_none(self, folders):
        folder, outputs = folders
        model = tiny.llama()
        base = logits(model)
        veneer.load_adapter(model, folder, "a", subfolder="a")
        model.load_adapter(str(folder), "b", adapter_kwargs={"subfolder": "b"}, is_trainable=True)
        model.set_adapter(["a", "b"])
        assert model.active_adapters() == ["a", "b"]
        both = logits(model)
        assert not torch.equal(both, outputs["a"])
        model.disable_adapters()
        assert torch.equal(logits(model), base)
        assert model.active_adapters() == ["a", "b"]
        model.enable_adapters()
        assert torch.equal(logits(model), both)
        with pytest.raises(ValueError, match="2 are active"):
            model.save_pretrained(folder / "x")

    def test_unknown_and_taken_names(self, folders):
        folder, _ = folders
        model = adapted()
        for call in (
            lambda: model.set_adapter("typo"),
            lambda: model.set_adapter(["default", "typo"]),
            lambda: model.delete_adapter(["default", "typo"]),
            lambda: model.get_adapter_state_dict("typo"),
            lambda: model.add_adapter(config(), "default"),
            lambda: model.load_adapter(folder / "a"),
            lambda: model.load_adapter(folder / "a", "typo", hotswap=True),
        ):
            with pytest.raises(AdapterNameError):
                call()
        assert model.active_adapters() == ["default"]


class TestLoading:
    def test_nothing_is_missing(self, folders):
        folder, outputs = folders
        model = tiny.llama()
        info = AdaptedModel.load_adapter(model, str(folder / "a"))
        assert isinstance(info, LoadStateDictInfo)
        assert not any(info.to_dict().values())
        assert torch.equal(logits(model), outputs["a"])

    @pytest.mark.parametrize("prefix", ["", "base_model.model."])
    @pytest.mark.parametrize("as_dict", [True, False])
    def test_values_without_a_file(self, folders, prefix, as_dict):
        folder, outputs = folders
        tensors = {
            prefix + key.removeprefix("base_model.model."): value
            for key, value in load_file(folder / "a" / "adapter_model.safetensors").items()
        }
        data = json.loads((folder / "a" / "adapter_config.json").read_text())
        given = data if as_dict else veneer.LoraConfig.from_dict(data)
        model = tiny.llama()
        AdaptedModel.load_adapter(model, adapter_name="a", adapter_state_dict=tensors, peft_config=given)
        assert torch.equal(logits(model), outputs["a"])
        assert model.peft_config["a"].inference_mode is not False

    def test_values_that_do_not_fit(self, folders):
        folder, _ = folders
        tensors = load_file(folder / "a" / "adapter_model.safetensors")
        for wrong, error in (
            ({**tensors, "extra": torch.zeros(1)}, AdapterFileError),
            (dict(list(tensors.items())[1:]), AdapterFileError),
            ({key: value * float("nan") for key, value in tensors.items()}, AdapterFileError),
        ):
            model = tiny.llama()
            with pytest.raises(error):
                AdaptedModel.load_adapter(model, adapter_state_dict=wrong, peft_config=config())
            assert type(model) is LlamaForCausalLM
        with pytest.raises(ConfigError, match="nothing to load"):
            AdaptedModel.load_adapter(model, peft_config=config())
        with pytest.raises(ConfigError, match="nothing to load"):
            AdaptedModel.load_adapter(model)

    def test_where_options_for_the_hub_may_be(self, folders, monkeypatch):
        from veneer.integrations import saved_adapter

        folder, _ = folders
        seen = []

        def resolved(location, *, subfolder=None, **hub):
            seen.append((location, subfolder, hub))
            return folder / "a"

        monkeypatch.setattr(saved_adapter, "adapter_folder", resolved)
        loaded = LoadStateDictConfig(download_kwargs={"revision": "x", "token": None, "subfolder": ""})
        AdaptedModel.load_adapter(
            tiny.llama(), "me/it", load_config=loaded, adapter_kwargs={"token": "t"}, local_files_only=True
        )
        AdaptedModel.load_adapter(tiny.llama(), "me/it", cache_dir="c", subfolder="s", device_map="auto")
        loaded = LoadStateDictConfig(pretrained_model_name_or_path="you/it")
        AdaptedModel.load_adapter(tiny.llama(), load_config=loaded)
        assert seen == [
            ("me/it", None, {"revision": "x", "token": "t", "local_files_only": True}),
            ("me/it", "s", {"cache_dir": "c"}),
            ("you/it", None, {}),
        ]

    def test_arguments_that_cannot_be_meant(self, folders):
        folder, _ = folders
        with pytest.raises(TypeError, match="no argument revison"):
            AdaptedModel.load_adapter(tiny.llama(), folder / "a", revison="main")
        with pytest.raises(ConfigError, match="pickle"):
            AdaptedModel.load_adapter(tiny.llama(), folder / "a", use_safetensors=False)
        with pytest.raises(ConfigError, match="hotswap='yes'"):
            AdaptedModel.load_adapter(tiny.llama(), folder / "a", hotswap="yes")
        with pytest.raises(TypeError, match="A config"):
            AdaptedModel.add_adapter(tiny.llama(), {"r": 8})
        with pytest.raises(ArgumentError, match="A config"):
            veneer.add_adapter(tiny.llama(), "lora")


class TestHotswap:
    def test_values_of_the_same_rank(self, folders):
        folder, outputs = folders
        model = adapted(("x",))
        parameters = dict(model.named_parameters())
        model.load_adapter(folder / "a", "x", hotswap=True)
        assert torch.equal(logits(model), outputs["a"])
        assert all(dict(model.named_parameters())[name] is value for name, value in parameters.items())
        assert not any(p.requires_grad for p in model.parameters())
        tensors = {key: value * 0 for key, value in load_file(folder / "a" / "adapter_model.safetensors").items()}
        model.load_adapter(
            adapter_name="x", adapter_state_dict=tensors, peft_config=config(), hotswap=True, is_trainable=True
        )
        assert torch.equal(logits(model), logits(tiny.llama()))
        assert sum(p.requires_grad for p in model.parameters()) == 8

    def test_what_was_enabled_before_the_first_adapter(self, folders):
        folder, outputs = folders
        model = tiny.llama()
        model.enable_peft_hotswap(target_rank=6)  # transformers' own: it only notes it
        for name in ("a", "b", "a"):
            AdaptedModel.load_adapter(model, folder / name)
            assert model.active_adapters() == ["default"]
            torch.testing.assert_close(logits(model), outputs[name])
            assert model.model.layers[0].self_attn.q_proj.adapters["default"].lora_A.shape[0] == 6
        with pytest.raises(AdapterNameError):
            model.load_adapter(folder / "b", hotswap=False)

    def test_enabled_afterwards(self, folders):
        folder, outputs = folders
        model = tiny.llama()
        veneer.load_adapter(model, folder / "b")
        with pytest.raises(RuntimeError, match="before loading the first"):
            model.enable_peft_hotswap(target_rank=4)
        model.enable_peft_hotswap(target_rank=4, check_compiled="warn")
        model.load_adapter(folder / "a")
        torch.testing.assert_close(logits(model), outputs["a"])


class TestRemoving:
    def test_the_last_adapter_gives_the_class_back(self, tmp_path):
        model = adapted(("a", "b"))
        assert model._hf_peft_config_loaded
        model.delete_adapter("a")
        assert model.active_adapters() == ["b"]
        model.delete_adapter(["b"])
        assert type(model) is LlamaForCausalLM
        assert not model._hf_peft_config_loaded
        assert not hasattr(model, "peft_config")
        assert torch.equal(logits(model), logits(tiny.llama()))
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()

    def test_all_at_once(self):
        model = adapted(("a", "b", "c"))
        model.delete_adapter(["c", "a", "b"])  # without a word on which of them became active
        assert type(model) is LlamaForCausalLM

    def test_merging(self, tmp_path):
        model = tiny.shake(adapted())
        expected = logits(model)
        merged = veneer.LoraModel(model).merge_and_unload()
        assert type(merged) is LlamaForCausalLM
        torch.testing.assert_close(logits(merged), expected)
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected)

    def test_a_merged_adapter_stays(self):
        model = adapted()
        veneer.LoraModel(model).merge_adapter()
        with pytest.raises(MergeError):
            model.delete_adapter("default")


class TestValues:
    def test_of_the_active_adapter_unless_named(self, tmp_path):
        model = adapted(("a", "b"))
        model.save_pretrained(tmp_path / "b")
        file = load_file(tmp_path / "b" / "adapter_model.safetensors")
        values = model.get_adapter_state_dict()
        assert {f"base_model.model.{key}" for key in values} == set(file)
        assert all(torch.equal(file[f"base_model.model.{key}"], value) for key, value in values.items())
        other = model.get_adapter_state_dict("a")
        assert other.keys() == values.keys()
        assert not torch.equal(next(iter(other.values())), next(iter(values.values())))

    def test_out_of_a_gathered_state_dict(self):
        model = adapted()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        expected = {key: value.clone() for key, value in model.get_adapter_state_dict().items()}
        tiny.shake(model)
        found = model.get_adapter_state_dict(state_dict=state)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


class TestOneDoor:
    """A model has its adapters in place, or by a facade; not both."""

    def test_a_facade_after_adapters_in_place(self):
        with pytest.raises(AttachError, match="has adapters already"):
            veneer.get_peft_model(adapted(), config())

    @pytest.mark.parametrize("bare", [True, False])
    def test_adapters_in_place_after_a_facade(self, bare, folders):
        facade = veneer.get_peft_model(tiny.llama(), config())
        model = facade.get_base_model() if bare else facade
        for call in (lambda: veneer.add_adapter(model, config(), "b"), lambda: veneer.load_adapter(model, "x")):
            with pytest.raises(AttachError, match="already"):
                call()

    def test_after_injecting(self):
        model = veneer.inject_adapter_in_model(config(), tiny.llama())
        with pytest.raises(AttachError, match="inject_adapter_in_model"):
            veneer.add_adapter(model, config(), "b")


class TestModelsWithLanguages:
    """Wav2Vec2's own load_adapter loads the values of its own adapter layers for a language."""

    def model(self):
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

        torch.manual_seed(0)
        return Wav2Vec2ForCTC(
            Wav2Vec2Config(
                vocab_size=8,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                conv_dim=[8],
                conv_stride=[2],
                conv_kernel=[3],
                num_feat_extract_layers=1,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                adapter_attn_dim=4,
                feat_extract_norm="layer",
                do_stable_layer_norm=True,
            )
        ).eval()

    def test_its_own_method_stays(self, tmp_path):
        model = self.model()
        own = {name: torch.full_like(value, 0.5) for name, value in model._get_adapters().items()}
        save_file(own, tmp_path / "adapter.deu.safetensors")
        model.config._name_or_path = model.name_or_path = str(tmp_path)
        veneer.add_adapter(model, config(), "lora")
        assert model.active_adapters() == ["lora"]
        model.load_adapter("deu", local_files_only=True)
        assert all(torch.equal(model._get_adapters()[name], value) for name, value in own.items())
        model.save_pretrained(tmp_path / "saved")
        model.delete_adapter("lora")
        veneer.load_adapter(model, tmp_path / "saved", "lora")
        assert model.active_adapters() == ["lora"]


class TestSavedValuesForAnAdapterThatIsThere:
    """PeftModel.load_adapter under a taken name: what Trainer calls to go on."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_dora": True, "modules_to_save": ["lm_head"]},
            {"init_lora_weights": "pissa"},
            {"trainable_token_indices": [1, 5]},
        ],
    )
    def test_it_takes_them(self, tmp_path, options):
        facade = veneer.get_peft_model(tiny.llama(), config().changed(**options))
        tiny.shake(facade)
        expected = {name: value.clone() for name, value in facade.state_dict().items()}
        facade.save_pretrained(tmp_path)
        tiny.shake(facade, seed=9)
        trainable = [name for name, p in facade.named_parameters() if p.requires_grad]
        facade.load_adapter(tmp_path, "default", is_trainable=True)
        assert all(torch.equal(value, expected[name]) for name, value in facade.state_dict().items())
        assert [name for name, p in facade.named_parameters() if p.requires_grad] == trainable

    def test_one_loaded_for_use_may_train_then(self, tmp_path):
        veneer.get_peft_model(tiny.llama(), config()).save_pretrained(tmp_path)
        facade = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
        facade.load_adapter(tmp_path, "default")
        assert not any(p.requires_grad for p in facade.parameters())
        facade.load_adapter(tmp_path, "default", is_trainable=True)
        assert sum(p.requires_grad for p in facade.parameters()) == 8

    @pytest.mark.parametrize("other", [{"r": 2}, {"lora_alpha": 5}, {"use_rslora": True}, {"use_dora": True}])
    def test_other_settings_are_refused(self, tmp_path, other):
        veneer.get_peft_model(tiny.llama(), config(**other)).save_pretrained(tmp_path)
        facade = veneer.get_peft_model(tiny.llama(), config())
        before = {name: value.clone() for name, value in facade.state_dict().items()}
        with pytest.raises(AdapterNameError, match=next(iter(other))):
            facade.load_adapter(tmp_path, "default", is_trainable=True)
        assert all(torch.equal(value, before[name]) for name, value in facade.state_dict().items())

    def test_other_layers_are_refused(self, tmp_path):
        veneer.get_peft_model(tiny.llama(), config().changed(target_modules=["k_proj"])).save_pretrained(tmp_path)
        facade = veneer.get_peft_model(tiny.llama(), config())
        with pytest.raises(AdapterFileError, match="k_proj"):
            facade.load_adapter(tmp_path, "default", is_trainable=True)

    def test_a_merged_one_is_refused(self, tmp_path):
        facade = veneer.get_peft_model(tiny.llama(), config())
        facade.save_pretrained(tmp_path)
        facade.merge_adapter()
        with pytest.raises(MergeError):
            facade.load_adapter(tmp_path, "default")


def test_no_pickle_is_written(tmp_path):
    model = tiny.llama()
    veneer.add_adapter(model, veneer.LoraConfig())
    with pytest.raises(ConfigError, match="would write a pickle"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()

"""PeftModel: its methods, names and errors."""

import pickle
import warnings

import pytest
import torch

import tiny
import veneer
from veneer.errors import AdapterNameError, AttachError, ConfigError, MergeError, TargetError, VeneerWarning

FIELDS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def model() -> veneer.PeftModel:
    return tiny.shake(veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS)))


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (None, "PeftModel"),
        ("CAUSAL_LM", "PeftModelForCausalLM"),
        ("SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM"),
        ("FEATURE_EXTRACTION", "PeftModelForFeatureExtraction"),
    ],
)
def test_the_task_chooses_the_class(task, name):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(target_modules=["q_proj"], task_type=task))
    assert type(model).__name__ == name


@pytest.mark.parametrize(("task", "head"), [("SEQ_CLS", "classifier"), ("TOKEN_CLS", "classifier")])
def test_a_classifiers_head_is_trained(task, head):
    model = veneer.get_peft_model(tiny.bert(), veneer.LoraConfig(target_modules=["query"], task_type=task))
    assert model.active_peft_config.modules_to_save == [head]
    assert model.get_base_model().classifier.modules_to_save["default"].weight.requires_grad


def test_a_classifier_without_a_known_head_is_noticed():
    with pytest.warns(VeneerWarning, match="has no classifier or score"):
        veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"], task_type="SEQ_CLS"))


def test_only_the_adapter_trains(model):
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2
    assert all("lora_" in name for name in trainable)
    assert trainable[0] == "base_model.model.model.layers.0.self_attn.q_proj.adapters.default.lora_A"


def test_counts_and_their_line(model, capsys):
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 2 * (8 * (32 + 32) + 8 * (32 + 16))
    assert total == trainable + sum(p.numel() for p in tiny.llama().parameters())
    model.print_trainable_parameters()
    share = 100 * trainable / total
    expected = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}\n"
    assert capsys.readouterr().out == expected


def test_unknown_attributes_are_the_models_own(model):
    assert model.config is model.get_base_model().config
    assert model.base_model.model is model.get_base_model()
    assert model.prefix == "lora_"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


def test_generate(model):
    out = model.generate(input_ids=tiny.ids(rows=1), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 10)


def test_several_adapters(model):
    x, base = tiny.ids(), tiny.llama()
    with_default = model(x).logits
    model.add_adapter("b", veneer.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    assert model.active_adapter == "default"
    assert torch.equal(model(x).logits, with_default)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".b." in n)
    model.set_adapter("b")
    assert model.active_adapters == ["b"]
    with_b = model(x).logits
    assert not torch.allclose(with_b, with_default)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    model.base_model.set_adapter(["default", "b"])
    assert model.active_adapter == ["default", "b"]
    model.set_adapter("default")
    assert torch.equal(model(x).logits, with_default)
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]
    assert type(model.get_base_model().model.layers[0].mlp.up_proj) is torch.nn.Linear
    with model.disable_adapter():
        torch.testing.assert_close(model(x).logits, base(x).logits, rtol=0, atol=0)


def test_deleting_the_active_adapter_activates_the_next(model):
    model.add_adapter("b", veneer.LoraConfig(**FIELDS))
    with pytest.warns(VeneerWarning, match="now 'b' is"):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"]


def test_deleting_the_only_adapter_leaves_the_base(model):
    base = model.get_base_model()
    model.delete_adapter("default")
    assert torch.equal(model(tiny.ids()).logits, tiny.llama()(tiny.ids()).logits)
    assert "peft_config" not in vars(base)
    assert model.active_adapters == []
    with pytest.raises(AdapterNameError, match="nothing to merge"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.set_adapter("defualt"), "did you mean 'default'"),
        (lambda m: m.delete_adapter("b"), "there are 'default'"),
        (lambda m: m.merge_adapter(["typo"]), "no adapter 'typo'"),
        (lambda m: m.merge_and_unload(adapter_names=["typo"]), "no adapter 'typo'"),
        (lambda m: m.set_requires_grad("typo"), "no adapter 'typo'"),
        (lambda m: m.base_model.set_adapter(["default", "typo"]), "no adapter 'typo'"),
        (lambda m: m.add_adapter("default", veneer.LoraConfig(**FIELDS)), "already"),
        (lambda m: m.save_pretrained("unused", selected_adapters=["typo"]), "no adapter 'typo'"),
    ],
)
def test_names_that_are_wrong(model, call, text):
    before = model(tiny.ids()).logits
    with pytest.raises(AdapterNameError, match=text):
        call(model)
    assert torch.equal(model(tiny.ids()).logits, before)


@pytest.mark.parametrize("name", ["", "a.b", "../x", "/abs/path", "x/y", "a" * 65, 5, None, "train", "keys"])
def test_names_that_are_not_allowed(model, name):
    with pytest.raises(AdapterNameError, match="cannot be called"):
        model.add_adapter(name, veneer.LoraConfig(**FIELDS))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["mlp", "layers", "0", "self_attn", "lora_A", "adapters"])
def test_names_that_are_also_parts_of_paths_work(name, tmp_path):
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS))
    tiny.shake(model)
    model.add_adapter(name, veneer.LoraConfig(**FIELDS))
    expected = model(tiny.ids()).logits
    model.save_pretrained(tmp_path)
    read = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(read(tiny.ids()).logits, expected)
    assert (tmp_path / name / "adapter_model.safetensors").exists()


def test_a_second_facade_is_refused(model):
    with pytest.raises(AttachError, match="has adapters already"):
        veneer.get_peft_model(model, veneer.LoraConfig(**FIELDS))
    with pytest.raises(AttachError, match="has adapters already"):
        veneer.get_peft_model(model.get_base_model(), veneer.LoraConfig(**FIELDS))


def test_a_failing_add_changes_nothing(model):
    names = list(model.state_dict())
    with pytest.raises(TargetError):
        model.add_adapter("b", veneer.LoraConfig(target_modules=["v_proj", "q_porj"]))
    assert list(model.state_dict()) == names


def test_running_out_of_memory_half_way_changes_nothing(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    base = tiny.llama()
    flags = [p.requires_grad for p in base.parameters()]
    monkeypatch.setattr("veneer.layers.saved_module.deepcopy", fail)
    with pytest.raises(MemoryError):
        veneer.get_peft_model(base, veneer.LoraConfig(**FIELDS, modules_to_save=["lm_head"]))
    assert list(base.state_dict()) == list(tiny.llama().state_dict())
    assert type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert [p.requires_grad for p in base.parameters()] == flags


def test_the_callers_config_is_left_alone():
    config = veneer.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    copy = config.changed()
    first = veneer.get_peft_model(tiny.llama(), config)
    second = veneer.get_peft_model(tiny.llama(), config)
    assert config == copy
    assert first.active_peft_config == second.active_peft_config
    assert first.active_peft_config.target_modules == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_alpha_cannot_be_changed_behind_the_adapters_back(model):
    with pytest.raises(ConfigError, match="lora_alpha cannot be changed"):
        model.peft_config["default"].lora_alpha = 32
    model.peft_config["default"].base_model_name_or_path = "elsewhere"


def test_disabling_nests_and_leaves_gradients_alone(model):
    model.set_requires_grad("default", False)
    with model.disable_adapter(), model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert torch.equal(model(tiny.ids()).logits, tiny.llama()(tiny.ids()).logits)


def test_disabling_ends_with_an_error(model):
    before = model(tiny.ids()).logits
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(model(tiny.ids()).logits, before)


def test_training_something_frozen_is_noticed(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert not loaded.training
    with pytest.warns(VeneerWarning, match="is_trainable=True"):
        loaded.train()
    trainable = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainable.train()
    assert any(p.requires_grad for p in trainable.parameters())


def test_pickle(model):
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(tiny.ids()).logits, model(tiny.ids()).logits)


def test_half_precision_bases():
    base = tiny.llama(dtype=torch.bfloat16)
    model = veneer.get_peft_model(base, veneer.LoraConfig(**FIELDS))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(tiny.ids()).logits.dtype == torch.bfloat16
    same = veneer.get_peft_model(
        tiny.llama(dtype=torch.bfloat16), veneer.LoraConfig(**FIELDS), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in same.parameters() if p.requires_grad} == {torch.bfloat16}


def test_a_generator_makes_it_reproducible():
    def factors(seed):
        model = veneer.get_peft_model(
            tiny.llama(), veneer.LoraConfig(**FIELDS), generator=torch.Generator().manual_seed(seed)
        )
        return [p for p in model.parameters() if p.requires_grad]

    assert all(map(torch.equal, factors(1), factors(1)))
    assert not all(map(torch.equal, factors(1), factors(2)))


def test_attention_that_reads_a_weight_is_refused():
    block = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(TargetError, match="reads its weight without calling it"):
        veneer.get_peft_model(block, veneer.LoraConfig(r=2, target_modules=["out_proj"]))


def test_what_peft_offers_and_veneer_does_not_is_said():
    with pytest.raises(ConfigError, match="mixed=True"):
        veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(**FIELDS), mixed=True)
    with pytest.raises(ConfigError, match="must be a LoraConfig, not dict"):
        veneer.get_peft_model(tiny.llama(), {"r": 8})


def test_removing_while_merged_is_refused(model):
    model.merge_adapter()
    with pytest.raises(MergeError, match="while it is merged"):
        model.delete_adapter("default")


def test_the_base_checkpoint_stays_clean(model, tmp_path):
    from safetensors.torch import load_file

    model.get_base_model().save_pretrained(tmp_path)
    saved, base = load_file(tmp_path / "model.safetensors"), tiny.llama()
    assert saved.keys() == base.state_dict().keys()
    for name, value in base.state_dict().items():
        assert torch.equal(saved[name], value)
    assert model.unload()._keys_to_ignore_on_save == base._keys_to_ignore_on_save

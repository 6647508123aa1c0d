"""A deeper model from stretches of its own layers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from veneer.config import LoftQConfig
from veneer.errors import AttachError, TargetError
from veneer.layers.replication import main_stack, replication_of
from veneer.targets import preview

X = tiny.ids()
STRETCHES = [(0, 2), (1, 2), (0, 2)]
ORDER = [0, 1, 1, 0, 1]


def config(**fields: Any) -> veneer.LoraConfig:
    given = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "layer_replication": STRETCHES}
    return veneer.LoraConfig(**{**given, **fields})


def adapted(base: nn.Module | None = None, **fields: Any) -> veneer.PeftModel:
    return tiny.shake(veneer.get_peft_model(tiny.llama() if base is None else base, config(**fields)))


def deeper(base: nn.Module) -> nn.Module:
    """The same depth with full copies: what replication means, without sharing."""
    base = copy.deepcopy(base)
    layers = [copy.deepcopy(base.model.layers[i]) for i in ORDER]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    base.model.layers = nn.ModuleList(layers)
    base.config = copy.deepcopy(base.config)
    base.model.config = base.config
    base.config.num_hidden_layers = len(layers)
    return base


def assert_untouched(model: nn.Module) -> None:
    fresh = tiny.llama()
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in fresh.named_modules()}
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert model.config.to_dict() == fresh.config.to_dict()
    assert vars(model.model.layers).keys() == vars(fresh.model.layers).keys()
    with torch.no_grad():
        assert torch.equal(model(X).logits, fresh(X).logits)


def test_layers_share_weights_and_each_has_its_adapter():
    model = adapted()
    layers = model.bare.model.layers
    assert len(layers) == 5
    for index, original in enumerate(ORDER):
        q = layers[index].self_attn.q_proj
        assert q.weight is layers[original].self_attn.q_proj.weight
        assert layers[index].self_attn.layer_idx == index
        assert sum(q.adapters["default"] is other.self_attn.q_proj.adapters["default"] for other in layers) == 1
    base = sum(p.numel() for p in tiny.llama().parameters())
    trainable, total = model.get_nb_trainable_parameters()
    assert total == base + trainable
    assert trainable == 5 * (8 * (32 + 32) + 8 * (48 + 32))
    with torch.no_grad(), model.disable_adapter():
        assert_close(model(X).logits, deeper(tiny.llama())(X).logits)


def test_the_preview_sees_the_deeper_model_and_changes_nothing():
    base = tiny.llama()
    seen = preview(base, config())
    assert_untouched(base)
    assert (seen.trainable, seen.total) == adapted().get_nb_trainable_parameters()
    assert "model.layers.4.mlp.down_proj" in [site.path for site in seen.sites]


def test_generating_with_a_cache():
    model = adapted()
    with torch.no_grad():
        cached = model.generate(input_ids=X[:1], max_new_tokens=6, do_sample=False, use_cache=True)
        fresh = model.generate(input_ids=X[:1], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, fresh)


@pytest.mark.parametrize("leave", ["unload", "delete_adapter"])
def test_taking_it_off_gives_the_base_back(leave):
    base = tiny.llama()
    layers = list(base.model.layers)
    model = adapted(base)
    model.unload() if leave == "unload" else model.delete_adapter("default")
    assert_untouched(base)
    assert all(one is other for one, other in zip(base.model.layers, layers, strict=True))


def test_layers_left_out_come_back_as_the_model_is_now():
    base = tiny.llama(layers=3)
    model = adapted(base, layer_replication=[(0, 1), (2, 3)]).to(torch.float64).eval()
    plain = model.unload()
    assert {p.dtype for p in plain.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in plain.parameters())
    assert_close(plain(X).logits, tiny.llama(layers=3).double()(X).logits)


def test_saving_the_base_writes_the_layers_it_came_with(tmp_path):
    from transformers import LlamaForCausalLM

    model = adapted()
    expected = model(X).logits
    model.bare.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 2
    assert torch.equal(again(X).logits, tiny.llama()(X).logits)
    assert len(model.bare.model.layers) == 5
    assert torch.equal(model(X).logits, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_merging_for_a_while(dora):
    model = adapted(use_dora=dora)
    expected = model(X).logits
    model.merge_adapter()
    assert_close(model(X).logits, expected)
    model.unmerge_adapter()
    assert torch.equal(model(X).logits, expected)
    model.unload()
    assert_untouched(model.bare)


def test_merging_for_good_gives_a_deeper_plain_model(tmp_path):
    from transformers import LlamaForCausalLM

    model = adapted()
    expected = model(X).logits
    merged = model.merge_and_unload()
    assert replication_of(merged) is None
    assert_close(merged(X).logits, expected)
    parameters = list(merged.parameters())
    assert len(parameters) == sum(1 for _ in merged.named_parameters(remove_duplicate=False)), "nothing is shared"
    assert not any("veneer" in name for name in vars(merged.model.layers))
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 5
    assert_close(again(X).logits, expected)


@pytest.mark.parametrize("start", ["loftq", "pissa", "olora"])
def test_starts_that_look_at_the_weight(start):
    options = {"loftq_config": LoftQConfig(loftq_bits=4)} if start == "loftq" else {}
    model = veneer.get_peft_model(tiny.llama(), config(init_lora_weights=start, r=4, **options))
    with torch.no_grad():
        if start != "loftq":
            assert_close(model(X).logits, deeper(tiny.llama())(X).logits)
    expected = tiny.shake(model)(X).logits
    model.merge_adapter()
    assert_close(model(X).logits, expected)
    model.unmerge_adapter()
    assert_close(copy.deepcopy(model).merge_and_unload()(X).logits, expected)
    model.unload()
    assert_untouched(model.bare)


def test_loftq_with_a_rank_for_each_replica_is_refused():
    options = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    with pytest.raises(veneer.errors.ConfigError, match="each must replace it by the same"):
        config(**options, rank_pattern={"layers.1.self_attn.q_proj": 2})


def test_files(tmp_path):
    model = adapted(modules_to_save=["layers.4.mlp.up_proj"])
    model.save_pretrained(tmp_path)
    base = tiny.llama()
    again = veneer.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(X).logits, model(X).logits)
    assert again.active_peft_config.layer_replication == STRETCHES
    again.unload()
    assert_untouched(base)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = tiny.llama()
    with pytest.raises(veneer.errors.AdapterFileError, match=r"not expected .*layers\.4"):
        veneer.PeftModel.from_pretrained(base, tmp_path, config=config(layer_replication=[(0, 2), (0, 2)]))
    assert_untouched(base)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model = adapted()
    again = copied(model)
    assert torch.equal(again(X).logits, model(X).logits)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert_untouched(again.unload())
    assert len(model.bare.model.layers) == 5


def test_training_with_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.bare.enable_input_require_grads()
        model(X).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        assert_close(one, other)


def test_compiling_in_one_graph():
    model = adapted()
    assert_close(torch.compile(model.bare, backend="eager", fullgraph=True)(X).logits, model(X).logits)


def test_layers_of_different_types_keep_theirs():
    """Gemma's sliding and full attention are told by the config's layer_types, one for each layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    small = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    )
    base = Gemma3ForCausalLM(small).eval()
    alone = base(X).logits
    model = adapted(base, target_modules=["q_proj"])
    assert base.config.layer_types == [["sliding_attention", "full_attention"][i] for i in ORDER]
    with torch.no_grad():
        cached = model.generate(input_ids=X[:1], max_new_tokens=6, do_sample=False, use_cache=True)
        fresh = model.generate(input_ids=X[:1], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, fresh)
    plain = model.unload()
    assert plain.config.layer_types == ["sliding_attention", "full_attention"]
    assert torch.equal(plain(X).logits, alone)


class TestFurtherAdapters:
    def test_they_lie_on_the_deeper_model(self, tmp_path):
        model = adapted()
        model.add_adapter("b", config(layer_replication=None, target_modules=["layers.4.self_attn.q_proj"]))
        model.add_adapter("c", config())
        assert model.peft_config["b"].layer_replication == STRETCHES
        model.set_adapter("b")
        tiny.shake(model, seed=6)
        expected = model(X).logits
        model.save_pretrained(tmp_path, selected_adapters=["b"])
        again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path / "b")
        assert torch.equal(again(X).logits, expected)
        model.delete_adapter("default")
        assert torch.equal(model(X).logits, expected)
        model.unload()
        assert_untouched(model.bare)

    def test_another_replication_is_refused(self):
        model = adapted()
        with pytest.raises(AttachError, match=r"are \[\(0, 2\), \(1, 2\), \(0, 2\)\] already"):
            model.add_adapter("b", config(layer_replication=[(0, 2), (0, 2)]))

    def test_one_that_comes_late_is_refused(self):
        model = adapted(layer_replication=None)
        with pytest.raises(AttachError, match="has adapters already"):
            model.add_adapter("b", config())
        assert len(model.bare.model.layers) == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"layer_replication": [(0, 2), (1, 3)]}, r"\(1, 3\) goes beyond the 2 layers of model\.layers"),
            ({"target_modules": ["q_porj"]}, r"did you mean q_proj \(5 layers\)"),
            ({"target_modules": ["layers.5.self_attn.q_proj"]}, "matches nothing"),
        ],
    )
    def test_nothing_has_changed(self, fields, message):
        base = tiny.llama()
        with pytest.raises(TargetError, match=message):
            veneer.get_peft_model(base, config(**fields))
        assert_untouched(base)

    def test_failing_half_way(self, monkeypatch):
        from veneer.layers import attach

        base, calls, real = tiny.llama(), [], attach.attach

        def fail(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise MemoryError
            real(*args)

        monkeypatch.setattr(attach, "attach", fail)
        with pytest.raises(MemoryError):
            veneer.get_peft_model(base, config())
        assert_untouched(base)

    def test_models_without_one_stack(self):
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
                self.right = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))

        with pytest.raises(TargetError, match="left and right have 2 each"):
            main_stack(Two())
        with pytest.raises(TargetError, match="no list of layers"):
            veneer.get_peft_model(tiny.Stack(), config(target_modules=["first"], task_type=None))

    def test_experts_and_heads_are_no_layers(self):
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                block = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(9))}) for _ in "ab"]
                self.blocks = nn.ModuleList(block)
                self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))

        assert main_stack(Mixed()) == "blocks"


def test_a_layer_that_comes_once_is_the_layer_itself():
    base = tiny.llama()
    layers = list(base.model.layers)
    model = adapted(base)
    stack = model.get_base_model().model.layers
    assert all(any(layer is one for one in stack) for layer in layers)

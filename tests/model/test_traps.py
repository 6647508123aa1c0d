"""Found by trying to break it: each was wrong once, or is in other libraries."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from veneer.errors import AdapterNameError, AttachError, MergeError, TargetError


def config(*targets: str, **fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(r=4, target_modules=list(targets), **{"init_lora_weights": False, **fields})


def stack(**fields) -> tuple[veneer.PeftModel, torch.Tensor, torch.Tensor]:
    """A model with a random adapter, an input, and the base's output."""
    x = tiny.ids(20)
    base = tiny.Stack()
    expected = base(x).detach()
    return tiny.shake(veneer.get_peft_model(base, config("first", "second", **fields))), x, expected


class TestDisabling:
    def test_disabling_layers_after_a_merge_gives_the_base(self):
        model, x, base = stack()
        with_adapter = model(x)
        model.merge_adapter()
        model.disable_adapter_layers()
        assert torch.equal(model(x), base)
        model.enable_adapter_layers()
        assert torch.equal(model(x), with_adapter)

    def test_merging_while_disabled_is_refused(self):
        model, x, base = stack()
        with model.disable_adapter():
            with pytest.raises(MergeError, match="disabled"):
                model.merge_adapter()
            assert torch.equal(model(x), base)

    def test_deleting_inside_a_disabled_block_keeps_the_bodys_own_outcome(self):
        model, x, base = stack()
        model.merge_adapter()
        with model.disable_adapter():
            model.delete_adapter("default")
        assert torch.equal(model(x), base)

    def test_shared_biases_keep_their_trained_values(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
                self.two.bias = self.one.bias

            def forward(self, x):
                return self.two(self.one(x))

        model = tiny.shake(veneer.get_peft_model(Shared(), config("one", bias="all")))
        x = torch.randn(2, 4)
        trained = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), Shared()(x))
        assert torch.equal(model(x), trained)

    def test_biases_replaced_by_assignment(self):
        model, x, _ = stack(bias="all")
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        with model.disable_adapter():
            assert torch.equal(model(x), tiny.Stack()(x))


class TestLayersThatAreRead:
    """Their owner takes the weight without calling them, so an adapter there would do nothing."""

    def test_a_part_of_attention_is_refused_alone(self):
        layer = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
        with pytest.raises(TargetError, match="MultiheadAttention reads"):
            veneer.get_peft_model(layer, veneer.LoraConfig(r=2, target_modules=["out_proj"]))

    @pytest.mark.parametrize(
        "fields", [{"target_modules": ["linear1"]}, {"target_modules": ["1"], "modules_to_save": ["norm1"]}]
    )
    def test_an_encoder_that_would_fuse_its_parts_calls_them(self, fields):
        model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 8)).eval()
        x = torch.randn(2, 3, 16)
        adapted = tiny.shake(veneer.get_peft_model(model, veneer.LoraConfig(r=2, **fields))).eval()
        with torch.no_grad():
            got, base = adapted(x), adapted.get_base_model()
            torch.testing.assert_close(got, copy.deepcopy(adapted).merge_and_unload()(x))
            with adapted.disable_adapter():
                assert not torch.allclose(got, adapted(x))
        assert type(base[0]) is not nn.TransformerEncoderLayer
        assert type(adapted.unload()[0]) is nn.TransformerEncoderLayer

    def test_mambas_projection(self):
        from transformers import MambaConfig, MambaForCausalLM

        with torch.device("meta"):
            model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, state_size=4))
        with pytest.raises(TargetError, match=r"dt_proj cannot be adapted: MambaMixer reads its weight"):
            veneer.get_peft_model(model, veneer.LoraConfig(r=2, target_modules=["in_proj", "dt_proj"]))


class TestMergedState:
    def test_adding_while_merged_is_refused(self):
        model, _, _ = stack()
        model.merge_adapter()
        with pytest.raises(MergeError, match="Unmerge default first"):
            model.add_adapter("d", config("first", use_dora=True))

    @pytest.mark.parametrize("call", ["set_adapter", "merge_adapter"])
    def test_a_name_said_twice_is_refused(self, call):
        model, _, _ = stack()
        with pytest.raises(AdapterNameError, match="named twice"):
            getattr(model, call)(["default", "default"])

    def test_choosing_none_is_refused(self):
        model, _, _ = stack()
        with pytest.raises(AdapterNameError, match="disable_adapter"):
            model.set_adapter([])

    @pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
    def test_a_weight_that_is_computed_cannot_be_merged(self, call):
        layers = {"plain": nn.Linear(4, 4), "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))}
        adapted = veneer.get_peft_model(nn.Sequential(OrderedDict(layers)), config("plain", "normed"))
        x = torch.randn(2, 4)
        before = adapted(x)
        with pytest.raises(MergeError, match="computed from others"):
            getattr(adapted, call)()
        assert torch.equal(adapted(x), before)

    def test_a_config_that_says_tied_without_the_methods(self):
        model, x, _ = stack()
        model.bare.config = type("Config", (), {"tie_word_embeddings": True})()
        expected = model(x)
        assert_close(model.merge_and_unload()(x), expected)


class TestSavedModules:
    def head(self) -> nn.Module:
        model = tiny.Stack()
        model.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))
        return model

    def test_a_sequential_can_be_saved(self):
        base, x = self.head(), tiny.ids(20)
        expected = base(x)
        model = tiny.shake(veneer.get_peft_model(base, config("first", modules_to_save=["head"])))
        assert len(base.head) == 3
        with model.disable_adapter():
            assert torch.equal(model(x), expected)
        trained = model(x)
        model.add_adapter("b", config("first"))
        model.set_adapter("b")
        model(x)
        model.set_adapter("default")
        assert torch.equal(model(x), trained)
        assert_close(model.merge_and_unload()(x), trained)
        assert type(base.head) is nn.Sequential

    def test_lists_are_refused(self):
        model = tiny.Stack()
        model.extra = nn.ModuleList([nn.Linear(2, 2)])
        with pytest.raises(AttachError, match="extra is a ModuleList, never called itself"):
            veneer.get_peft_model(model, config("first", modules_to_save=["extra"]))

    def test_buffers_are_saved_and_loaded(self, tmp_path):
        def base() -> nn.Module:
            torch.manual_seed(0)
            model = tiny.Stack()
            model.head = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(16), nn.Linear(16, 5))
            return model

        x = tiny.ids(20)
        model = veneer.get_peft_model(base(), config("first", modules_to_save=["head"])).train()
        for _ in range(3):
            model(x)
        expected = model.eval()(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(veneer.PeftModel.from_pretrained(base(), tmp_path)(x), expected)

    def test_hooks_run_once(self):
        base, x = tiny.Stack(), tiny.ids(20)
        base.head.register_forward_hook(lambda module, args, output: output * 2)
        expected = base(x)
        model = veneer.get_peft_model(base, config("first", modules_to_save=["head"], init_lora_weights=True))
        assert torch.equal(model(x), expected)

    def test_a_method_called_route_is_left_alone(self):
        class Head(nn.Linear):
            def route(self, x):
                return 2 * x

            def forward(self, x):
                return self.route(super().forward(x))

        base, x = tiny.Stack(), tiny.ids(20)
        base.head = Head(16, 5)
        expected = base(x)
        for fields in ({"modules_to_save": ["head"]}, {"target_modules": ["first", "head"]}):
            model = veneer.get_peft_model(base, veneer.LoraConfig(**{"r": 2, "target_modules": ["first"], **fields}))
            assert torch.equal(model(x), expected)
            model.unload()

    def test_attributes_that_clash_are_refused(self):
        base = tiny.Stack()
        base.first.adapters = 5
        with pytest.raises(AttachError, match="first has an attribute 'adapters' of its own"):
            veneer.get_peft_model(base, config("first"))


class TestTwoCalls:
    def test_adapters_on_a_part_and_on_the_whole_are_refused(self):
        model = tiny.llama()
        veneer.get_peft_model(model.model, config("q_proj"))
        with pytest.raises(AttachError, match="has adapters from another call"):
            veneer.get_peft_model(model, config("q_proj"), "out")

    @pytest.mark.parametrize("name", ["training", "_modules", "_parameters", "forward"])
    def test_names_modules_own_are_refused_and_leave_no_trace(self, name):
        model = tiny.Stack()
        with pytest.raises(AdapterNameError):
            veneer.get_peft_model(model, config("first"), name)
        assert type(model.first) is nn.Linear
        assert "adapters" not in model.first._modules


class TestSavingTheBase:
    def test_trained_biases_and_merged_weights_stay_out_of_the_base_checkpoint(self, tmp_path):
        from safetensors.torch import load_file

        model = tiny.shake(
            veneer.get_peft_model(
                tiny.bert(), veneer.LoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS")
            )
        )
        x = tiny.ids()
        trained = model(x).logits
        model.merge_adapter()
        merged = model(x).logits
        model.bare.save_pretrained(tmp_path)
        assert torch.equal(model(x).logits, merged)
        base = tiny.bert().state_dict()
        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == base.keys()
        assert all(torch.equal(saved[name], base[name]) for name in base)
        model.unmerge_adapter()
        assert torch.equal(model(x).logits, trained)
        plain = model.unload()
        assert "save_pretrained" not in vars(plain)

    def test_all_names_are_checked_before_the_first_is_saved(self, tmp_path):
        model, _, _ = stack()
        with pytest.raises(AdapterNameError, match="typo"):
            model.save_pretrained(tmp_path / "x", selected_adapters=["default", "typo"])
        assert not (tmp_path / "x").exists()

    def test_values_from_a_gathered_state_dict(self, tmp_path):
        model, x, _ = stack(bias="all", modules_to_save=["head"], use_dora=True)
        expected = model(x)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        tiny.shake(model, seed=8)
        model.save_pretrained(tmp_path, state_dict=state)
        assert torch.equal(veneer.PeftModel.from_pretrained(tiny.Stack(), tmp_path)(x), expected)


class TestFilesOfPeft:
    @pytest.mark.filterwarnings("ignore:2 settings do not fit:veneer.errors.VeneerWarning")
    def test_names_inside_a_saved_head_are_passed_over(self, tmp_path):
        """PEFT writes what all-linear found in a classifier's head, and trains the head in full."""
        from transformers import RobertaConfig, RobertaForSequenceClassification

        from parity import oracle

        def base() -> nn.Module:
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
            return RobertaForSequenceClassification(RobertaConfig(vocab_size=64, num_labels=3, **sizes)).eval()

        theirs = tiny.shake(oracle.made_by_peft(base(), r=2, target_modules="all-linear", task_type="SEQ_CLS")).eval()
        oracle.save(theirs, tmp_path)
        model = veneer.PeftModel.from_pretrained(base(), tmp_path)
        assert_close(model(tiny.ids()).logits, theirs(tiny.ids()).logits)

    def test_an_initialisation_that_is_over_does_not_matter(self, tmp_path):
        from parity import oracle

        theirs = tiny.shake(
            oracle.made_by_peft(tiny.llama(), r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")
        )
        oracle.save(theirs, tmp_path)
        model = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
        assert_close(model(tiny.ids()).logits, theirs(tiny.ids()).logits)

    @pytest.mark.parametrize("fields", [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "embed_tokens"]}])
    def test_embeddings_beside_the_adapter(self, fields, tmp_path):
        from parity import oracle

        theirs = tiny.shake(oracle.made_by_peft(tiny.llama(), r=4, **fields))
        oracle.quietly(theirs.save_pretrained, str(tmp_path), save_embedding_layers=True)
        model = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
        assert_close(model(tiny.ids()).logits, theirs(tiny.ids()).logits)

"""Another adapter in the place of one: equal to loading it afresh, and without compiling again."""

import copy
import itertools
import json
import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from parity.oracle import made_by_peft, quietly, read_by_peft, save
from veneer.errors import AdapterFileError, AdapterNameError, AttachError, ConfigError, MergeError, VeneerWarning

TARGETS = ["q_proj", "v_proj"]
X = tiny.ids()

FIRST = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
OTHERS = {
    "same": {},
    "smaller": {"r": 2},
    "larger": {"r": 6},
    "another alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5}, "alpha_pattern": {"v_proj": 1}},
    "dropout": {"lora_dropout": 0.5},
    "a layer less": {"layers_to_transform": [1]},
    "targets less": {"target_modules": ["v_proj"]},
}


def made(folder=None, *, seed=3, base=tiny.llama, **fields) -> veneer.PeftModel:
    model = veneer.get_peft_model(base(), veneer.LoraConfig(**{**FIRST, **fields}))
    tiny.shake(model, seed=seed).eval()
    if folder is not None:
        model.save_pretrained(folder)
    return model


def same_files(one, other) -> bool:
    def values(folder):
        return veneer.load_peft_weights(folder)

    mine, theirs = values(one), values(other)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other)]
    return (
        configs[0] == configs[1]
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[key], theirs[key]) for key in mine)
    )


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_as_if_loaded_afresh(tmp_path, other, dora, prepared):
    fields = {"use_dora": dora, **OTHERS[other]}
    model, expected = made(tmp_path / "first", use_dora=dora), made(tmp_path / "new", seed=7, **fields)
    first = model(X).logits
    if prepared:
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=6)
        assert_close(model(X).logits, first)
    veneer.hotswap_adapter(model, tmp_path / "new")
    assert_close(model(X).logits, expected(X).logits)
    assert model.active_peft_config.to_dict() == expected.active_peft_config.to_dict()
    model.save_pretrained(tmp_path / "saved")
    assert same_files(tmp_path / "saved", tmp_path / "new")
    model.merge_adapter()
    assert_close(model(X).logits, expected(X).logits)
    model.unmerge_adapter()
    veneer.hotswap_adapter(model, tmp_path / "first")
    assert_close(model(X).logits, first)
    model.save_pretrained(tmp_path / "saved")
    assert same_files(tmp_path / "saved", tmp_path / "first")


def test_an_adapter_of_pefts_and_as_peft_reads_it(tmp_path):
    theirs = tiny.shake(made_by_peft(tiny.llama(), **{**FIRST, "rank_pattern": {"v_proj": 3}})).eval()
    save(theirs, tmp_path)
    model = made()
    veneer.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    veneer.hotswap_adapter(model, str(tmp_path), "default", "cpu")
    assert_close(model(X).logits, theirs(X).logits)
    model.save_pretrained(tmp_path / "again")
    assert_close(read_by_peft(tiny.llama(), tmp_path / "again")(X).logits, theirs(X).logits)


def test_saved_modules_and_biases_go_with_it(tmp_path):
    fields = {"target_modules": ["first", "tokens"], "modules_to_save": ["head"], "bias": "all"}
    x = tiny.ids(20)
    model, new = made(base=tiny.Stack, **fields), made(tmp_path, seed=8, base=tiny.Stack, **fields, r=2)
    veneer.hotswap_adapter(model, tmp_path)
    assert_close(model(x), new(x))
    with model.disable_adapter():
        assert torch.equal(model(x), tiny.Stack()(x))
    assert_close(model(x), new(x))
    assert torch.equal(model.unload()(x), tiny.Stack()(x))


def test_trained_rows_of_the_embedding_go_with_it(tmp_path):
    model, new = made(trainable_token_indices=[9, 13]), made(tmp_path, seed=8, r=2, trainable_token_indices=[9, 13])
    veneer.hotswap_adapter(model, tmp_path)
    assert_close(model(X).logits, new(X).logits)


def test_a_bias_of_the_adapter_goes_with_it(tmp_path):
    model, new = made(lora_bias=True), made(tmp_path, seed=8, lora_bias=True, target_modules=["v_proj"], r=2)
    veneer.hotswap_adapter(model, tmp_path)
    assert_close(model(X).logits, new(X).logits)


class TestFromAStateDict:
    @pytest.mark.parametrize("named", ["", ".default"])
    @pytest.mark.parametrize("prefix", ["base_model.model.", ""])
    def test_values_in_memory(self, prefix, named):
        model, new = made(), made(seed=9, r=2, use_rslora=True)
        state = {
            key.replace("base_model.model.", prefix).replace(".weight", f"{named}.weight"): value
            for key, value in veneer.get_peft_model_state_dict(new).items()
        }
        veneer.hotswap_adapter_from_state_dict(model, state, "default", new.peft_config["default"])
        assert_close(model(X).logits, new(X).logits)
        tiny.shake(new, seed=1)  # they are copies
        assert not torch.equal(model(X).logits, new(X).logits)

    def test_what_does_not_fit(self):
        model, new = made(), made(r=2)
        before, state = model(X).logits, veneer.get_peft_model_state_dict(new)
        with pytest.raises(AdapterFileError, match="wrong shape"):
            veneer.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
        with pytest.raises(ConfigError, match="not dict"):
            veneer.hotswap_adapter_from_state_dict(model, state, "default", {})
        assert torch.equal(model(X).logits, before)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"target_modules": [*TARGETS, "up_proj"]}, "mlp.up_proj has no adapter 'default' on the model"),
            ({"use_dora": True}, "use_dora is False on the model, True in the new"),
            ({"lora_bias": True}, "lora_bias is False on the model, True in the new"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head trained by one of them only"),
        ],
    )
    def test_another_form(self, tmp_path, fields, text):
        made(tmp_path, **fields)
        model = made()
        before, config = model(X).logits, model.active_peft_config
        with pytest.raises(AttachError, match=f"under a name of its own:[\\s\\S]*{text}"):
            veneer.hotswap_adapter(model, tmp_path)
        assert torch.equal(model(X).logits, before)
        assert model.active_peft_config is config

    def test_damage(self, tmp_path):
        made(tmp_path, seed=5)
        config = tmp_path / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
        model = made()
        before = model(X).logits
        with pytest.raises(AdapterFileError, match="lora_alpha: trained with 8"):
            veneer.hotswap_adapter(model, tmp_path)
        with pytest.raises(AdapterFileError, match="There is no folder"):
            veneer.hotswap_adapter(model, tmp_path / "nowhere")
        with pytest.raises(AdapterNameError, match="no adapter 'other'"):
            veneer.hotswap_adapter(model, tmp_path, "other")
        assert torch.equal(model(X).logits, before)

    def test_an_adapter_that_goes_with_a_changed_base(self, tmp_path):
        made(tmp_path)
        pissa = made(init_lora_weights="pissa")
        with pytest.raises(AttachError, match="the start of the adapter on the model was taken off the base"):
            veneer.hotswap_adapter(pissa, tmp_path)
        with pytest.raises(AttachError, match="its start was taken off the base; save and load"):
            veneer.prepare_model_for_compiled_hotswap(pissa, target_rank=9)
        model, state = made(), veneer.get_peft_model_state_dict(pissa)
        with pytest.raises(AttachError, match="init_lora_weights='pissa': the new adapter goes with a changed base"):
            veneer.hotswap_adapter_from_state_dict(model, state, "default", pissa.peft_config["default"])
        with pytest.raises(AttachError, match="has replaced weights of the base"):
            veneer.hotswap_adapter(made(init_lora_weights="loftq"), tmp_path)

    def test_an_adapter_on_tied_modules(self, tmp_path):
        fields = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
        made(tmp_path, base=lambda: tiny.llama(tied=True), r=2, **fields)
        model = made(base=lambda: tiny.llama(tied=True), **fields)
        before = model(X).logits
        with pytest.raises(AttachError, match="one adapter lies on the embedding and the output head"):
            veneer.hotswap_adapter(model, tmp_path)
        with pytest.raises(AttachError, match="shares the adapter of model.embed_tokens"):
            veneer.prepare_model_for_compiled_hotswap(model, target_rank=9)
        assert torch.equal(model(X).logits, before)

    def test_merged(self, tmp_path):
        model = made(tmp_path)
        model.merge_adapter()
        with pytest.raises(MergeError, match="before swapping"):
            veneer.hotswap_adapter(model, tmp_path)

    def test_a_rank_above_what_was_prepared(self, tmp_path):
        made(tmp_path, r=8)
        model = made()
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=6)
        with pytest.raises(AttachError, match=r"rank 8, and the model is prepared for 6[\s\S]*target_rank=8"):
            veneer.hotswap_adapter(model, tmp_path)


class TestPreparing:
    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"target_rank": 3}, AttachError, "it has rank 4 already"),
            ({"target_rank": "8"}, ConfigError, "target_rank='8'"),
            ({"check_compiled": "maybe"}, ConfigError, "'error', 'warn' or 'ignore'"),
        ],
    )
    def test_wrong_arguments(self, arguments, error, text):
        model = made()
        with pytest.raises(error, match=text):
            veneer.prepare_model_for_compiled_hotswap(model, **arguments)
        assert model.bare.model.layers[0].self_attn.q_proj.adapters["default"].scale == 2.0

    def test_without_an_adapter(self):
        with pytest.raises(AdapterNameError, match="no adapter"):
            veneer.prepare_model_for_compiled_hotswap(tiny.Stack())

    def test_a_compiled_model(self):
        model = made()
        for compiled in (torch.compile(model, backend="eager"), model):
            with pytest.raises(AttachError, match="before torch.compile"):
                veneer.prepare_model_for_compiled_hotswap(compiled)
            with pytest.warns(VeneerWarning, match="will compile again"):
                veneer.prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
            veneer.prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
            model.bare.model.compile(backend="eager")

    def test_gradients_of_the_padding_are_zero(self):
        model, twin = made(), made()
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=7)
        for one in (model, twin):
            one(X).logits.sum().backward()
        for site in ("q_proj", "v_proj"):
            mine, plain = (
                one.bare.model.layers[1].self_attn.get_submodule(site).adapters["default"] for one in (model, twin)
            )
            assert_close(mine.lora_A.grad[:4], plain.lora_A.grad)
            assert_close(mine.lora_B.grad[:, :4], plain.lora_B.grad)
            assert mine.lora_A.grad[4:].eq(0).all()
            assert mine.lora_B.grad[:, 4:].eq(0).all()

    def test_scaling_and_copying_a_prepared_model(self, tmp_path):
        model, plain = made(), made()
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=7)
        twin = copy.deepcopy(model)
        for one in (model, plain):
            one.set_scale("default", 0.3)
        assert_close(model(X).logits, plain(X).logits)
        with veneer.rescale_adapter_scale(model, 2):
            assert not torch.equal(model(X).logits, twin(X).logits)
        model.set_scale("default", 1)
        assert torch.equal(model(X).logits, twin(X).logits)
        model.save_pretrained(tmp_path, state_dict={k: v.clone() for k, v in model.state_dict().items()})
        assert {v.shape[0] for k, v in veneer.load_peft_weights(tmp_path).items() if "lora_A" in k} == {4}
        assert not model.bare.model.layers[0].self_attn.q_proj.adapters["default"].is_rescaled()

    def test_setting_values_of_the_true_rank(self):
        model, new = made(), made(seed=6)
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=7)
        veneer.set_peft_model_state_dict(model, veneer.get_peft_model_state_dict(new))
        assert_close(model(X).logits, new(X).logits)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def grouped(folder, rank: int, *, seed: int) -> veneer.PeftModel:
    torch.manual_seed(0)
    return made(folder, seed=seed, base=Grouped, r=rank, target_modules=["conv"])


def test_factors_in_blocks_are_swapped_at_their_rank_only(tmp_path):
    same, smaller = grouped(tmp_path / "same", 4, seed=1), grouped(tmp_path / "smaller", 2, seed=2)
    model, x = grouped(None, 4, seed=0), torch.randn(1, 4, 8, 8)
    before = model(x)
    veneer.prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert torch.equal(model(x), before)
    with pytest.raises(AttachError, match="conv: rank 2, and 4 on the model: the factors of conv2d are in blocks"):
        veneer.hotswap_adapter(model, tmp_path / "smaller")
    assert torch.equal(model(x), before)
    veneer.hotswap_adapter(model, tmp_path / "same")
    assert_close(model(x), same(x))
    unprepared = grouped(None, 4, seed=0)
    veneer.hotswap_adapter(unprepared, tmp_path / "smaller")
    assert_close(unprepared(x), smaller(x))


def test_swapping_inside_a_rescaled_block_keeps_the_new_scale(tmp_path):
    model, new = made(), made(tmp_path, seed=4, lora_alpha=3)
    with veneer.rescale_adapter_scale(model, 5):
        veneer.hotswap_adapter(model, tmp_path)
    assert_close(model(X).logits, new(X).logits)


def test_which_factors_train_goes_with_the_adapter(tmp_path):
    made(tmp_path / "mica", init_lora_weights="mica")
    made(tmp_path / "plain")
    model = made()
    veneer.hotswap_adapter(model, tmp_path / "mica")
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A"}
    veneer.hotswap_adapter(model, tmp_path / "plain")
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_removing_after_a_swap_leaves_nothing(tmp_path):
    made(tmp_path, target_modules=["v_proj"])
    model = made()
    veneer.hotswap_adapter(model, tmp_path)
    base = model.unload()
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(base(X).logits, tiny.llama()(X).logits)


def test_what_is_idle_does_not_train(tmp_path):
    made(tmp_path, target_modules=["v_proj"], use_dora=True)
    model = made(use_dora=True)
    veneer.hotswap_adapter(model, tmp_path)
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"v_proj"}


class TestCompiled:
    """Fifteen swaps between adapters of other ranks, scales and layers; one compilation."""

    @pytest.fixture(params=[False, True], ids=["lora", "dora"])
    def folders(self, tmp_path, request):
        kinds = [OTHERS[name] for name in ("smaller", "larger", "rslora", "patterns", "a layer less")]
        for at, fields in enumerate(kinds):
            made(tmp_path / str(at), seed=at, use_dora=request.param, **fields)
        return [tmp_path / str(at) for at in range(len(kinds))]

    @pytest.mark.parametrize(("in_place", "grad"), [(False, False), (True, True)])
    def test_it_does_not_compile_again(self, folders, in_place, grad):
        torch._dynamo.reset()
        graphs = itertools.count()
        compiled_graphs = []

        def backend(graph, inputs):
            compiled_graphs.append(next(graphs))
            return graph.forward

        base = veneer.PeftModel.from_pretrained(tiny.llama(), folders[1], is_trainable=grad).eval()
        model = base.get_base_model() if in_place else base
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=6)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=True):
            compiled(X)
            for folder in [*folders[:4], *folders[:4]] if grad else folders * 3:
                veneer.hotswap_adapter(compiled, folder)
                expected = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
                assert_close(compiled(X).logits, expected(X).logits)
        assert len(compiled_graphs) == 1

    def test_unprepared_it_compiles_again_and_is_right(self, folders):
        torch._dynamo.reset()
        model = veneer.PeftModel.from_pretrained(tiny.llama(), folders[0])
        compiled = torch.compile(model, backend="eager")
        for folder in folders[2:3] + folders[:1]:
            compiled(X)
            veneer.hotswap_adapter(compiled, folder)
            expected = veneer.PeftModel.from_pretrained(tiny.llama(), folder)
            assert_close(compiled(X).logits, expected(X).logits)


def test_where_peft_is_wrong(tmp_path):
    """rank_pattern (its issue 3738): the scale goes with the pattern's rank; and the config tells the new rank."""
    from peft.utils.hotswap import hotswap_adapter

    fields = {"rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}
    new = made(tmp_path / "new", seed=4, **fields)
    first = made(tmp_path / "first", modules_to_save=["lm_head"])
    theirs = read_by_peft(tiny.llama(), tmp_path / "first")
    with pytest.raises(KeyError):
        quietly(hotswap_adapter, theirs, str(tmp_path / "new"), "default", torch_device="cpu")
    veneer.hotswap_adapter(first, tmp_path / "new")
    assert_close(first(X).logits, new(X).logits)
    assert first.active_peft_config.rank_pattern == {"q_proj": 2}
    shutil.rmtree(tmp_path / "new")


def test_a_gradient_of_another_rank_is_dropped(tmp_path):
    made(tmp_path / "new", seed=7, r=2)
    model = made()
    model(X).logits.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    veneer.hotswap_adapter(model, tmp_path / "new")
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()

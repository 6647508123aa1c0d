"""Single rows of an embedding, trained in full."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import veneer
from parity import oracle
from veneer.errors import AdapterFileError, AttachError, MergeError, TargetError, VeneerWarning
from veneer.layers.part import Part, parts_of
from veneer.model.overlay import overlay_needed
from veneer.model.tensors import adapter_tensors
from veneer.targets import preview

TOKENS = [9, 3, 40]
X = tiny.ids()
TOY = {"target_modules": ["body"], "task_type": None, "r": 2}


def config(**fields: Any) -> veneer.LoraConfig:
    given = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "trainable_token_indices": TOKENS}
    return veneer.LoraConfig(**{**given, **fields})


def adapted(base: nn.Module | None = None, **fields: Any) -> veneer.PeftModel:
    base = tiny.llama(tied=True) if base is None else base
    return tiny.shake(veneer.get_peft_model(base, config(**fields)))


def rows_of(model: veneer.PeftModel, name: str = "default") -> nn.Parameter:
    return model.bare.get_input_embeddings().token_rows[name].trainable_tokens_delta


class Tied(nn.Module):
    """An embedding and a head with a bias, over one weight."""

    def __init__(self, *, tied: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 6, **options)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 20)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.tokens(ids))))


def plain(base: Tied, W: Tensor, x: Tensor) -> Tensor:
    """The same computed from one weight, as the definition says."""
    y = torch.tanh(base.body(F.embedding(x, W, padding_idx=base.tokens.padding_idx)))
    return F.linear(y, W, base.head.bias)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 4}])
@pytest.mark.parametrize("tokens", [[4], [7, 2, 19, 0], list(range(20))])
def test_outputs_and_gradients_are_those_of_the_weight_with_its_rows_replaced(tokens, options):
    base = Tied(**options).double()
    model = adapted(copy.deepcopy(base), **TOY, trainable_token_indices=tokens)
    with torch.no_grad():
        model.bare.body.adapters["default"].lora_B.zero_()
    x = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    rows = model.bare.tokens.token_rows["default"].trainable_tokens_delta
    same = rows.detach().clone().requires_grad_()
    expected = plain(base, base.tokens.weight.detach().index_copy(0, torch.tensor(tokens), same), x)
    found = model(x)
    assert_close(found, expected)
    (expected.square().mean()).backward()
    (found.square().mean()).backward()
    assert_close(rows.grad, same.grad)


def test_the_base_and_its_names_stay():
    model, base = adapted(), tiny.llama(tied=True)
    for name, value in base.state_dict().items():
        assert torch.equal(model.bare.state_dict()[name], value)
    with model.disable_adapter():
        assert torch.equal(model(X).logits, base(X).logits)
    assert [name for name, p in model.bare.named_parameters() if p.requires_grad and "tokens_delta" in name] == [
        "model.embed_tokens.token_rows.default.trainable_tokens_delta"
    ]


def test_counts_and_the_preview():
    model = adapted()
    seen = preview(tiny.llama(tied=True), config())
    assert (seen.trainable, seen.total) == model.get_nb_trainable_parameters()
    assert seen.trainable == 3 * 32 + sum(site.parameters for site in seen.sites)
    assert seen.resolution.token_rows[0].tied == ("lm_head",)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_puts_the_rows_in_place_and_unmerging_takes_them_out_bit_for_bit(tied, dtype):
    base = tiny.llama(tied=tied, dtype=dtype)
    model = adapted(copy.deepcopy(base), init_lora_weights=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(X).logits
    assert rows_of(model).dtype == torch.float32
    model.merge_adapter()
    bare = model.bare
    W = base.model.embed_tokens.weight.detach().clone()
    W[TOKENS] = rows_of(model).detach().to(dtype)
    assert torch.equal(bare.model.embed_tokens.weight, W)
    assert (bare.lm_head.weight is bare.model.embed_tokens.weight) == tied
    if dtype == torch.float32:
        assert_close(model(X).logits, expected)
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (bare.lm_head.weight is bare.model.embed_tokens.weight) == tied
    assert torch.equal(model(X).logits, expected)


def test_rows_in_half_precision_give_what_the_merged_weight_gives():
    model = adapted(tiny.llama(tied=True, dtype=torch.bfloat16), target_modules=["q_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    expected = model(X).logits
    model.merge_adapter()
    assert torch.equal(model(X).logits, expected)


def test_a_merged_model_stays_tied_and_is_saved_as_such(tmp_path):
    from transformers import LlamaForCausalLM

    model = adapted()
    expected = model(X).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert type(merged.lm_head) is nn.Linear
    assert type(merged.model.embed_tokens) is nn.Embedding
    merged.save_pretrained(tmp_path)
    assert_close(LlamaForCausalLM.from_pretrained(tmp_path).eval()(X).logits, expected)


@pytest.mark.parametrize("indices", [{"lm_head": TOKENS}, {"lm_head": [3], "embed_tokens": TOKENS}])
def test_rows_of_one_side_of_a_tie_are_merged_there(indices):
    with pytest.warns(VeneerWarning, match="Merging makes them two weights"):
        model = adapted(trainable_token_indices=indices)
    expected = model(X).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert_close(merged(X).logits, expected)


def test_saving_the_base_leaves_the_rows_out(tmp_path):
    from transformers import LlamaForCausalLM

    model = adapted()
    model.bare.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(X).logits, tiny.llama(tied=True)(X).logits)


def test_files(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "gathered", state_dict=model.state_dict())
    expected = model(X).logits
    for folder in ("whole", "gathered"):
        again = veneer.PeftModel.from_pretrained(tiny.llama(tied=True), tmp_path / folder)
        assert torch.equal(again(X).logits, expected)
        assert again.active_peft_config.trainable_token_indices == TOKENS
    with pytest.raises(AdapterFileError, match=r"wrong shape .*trainable_tokens_delta \[3, 32\]"):
        veneer.PeftModel.from_pretrained(
            tiny.llama(tied=True), tmp_path / "whole", config=config(trainable_token_indices=[1, 2])
        )


def test_peft_brings_the_embedding_along_after_a_resize(tmp_path):
    """Rows of the base that the adapter replaces may differ: those of new tokens start at random."""
    base = tiny.llama(tied=True)
    theirs = tiny.shake(oracle.made_by_peft(base, target_modules=["q_proj"], trainable_token_indices=TOKENS)).eval()
    oracle.quietly(theirs.save_pretrained, str(tmp_path), save_embedding_layers=True)
    with torch.no_grad():
        base.model.embed_tokens.weight[TOKENS] = 7
    ours = veneer.PeftModel.from_pretrained(base, tmp_path)
    assert_close(ours(X).logits, theirs(X).logits)
    with torch.no_grad():
        base = tiny.llama(tied=True)
        base.model.embed_tokens.weight[1] = 7
    with pytest.raises(AdapterFileError, match="differs from this model's"):
        veneer.PeftModel.from_pretrained(base, tmp_path)


def test_without_get_input_embeddings_the_file_names_the_embedding(tmp_path):
    model = adapted(Tied(), **TOY, trainable_token_indices=[9, 3])
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(Tied(), tmp_path)
    assert again.active_peft_config.trainable_token_indices == {"tokens": [9, 3]}
    assert torch.equal(again(X % 20), model(X % 20))


class TestSeveralAdapters:
    def model(self, second: list[int]) -> veneer.PeftModel:
        model = adapted()
        model.add_adapter("b", config(trainable_token_indices=second))
        model.set_adapter("b")
        tiny.shake(model, seed=8)
        model.set_adapter("default")
        return model

    def test_each_has_its_own(self):
        model = self.model([3, 5])
        assert rows_of(model).requires_grad
        assert not rows_of(model, "b").requires_grad
        first = model(X).logits
        model.set_adapter("b")
        assert not torch.allclose(model(X).logits, first)
        model.delete_adapter("default")
        assert list(model.bare.model.embed_tokens.token_rows) == ["b"]

    def test_together_on_different_rows(self):
        model = self.model([5])
        model.base_model.set_adapter(["default", "b"])
        expected = model(X).logits
        model.merge_adapter()
        assert_close(model(X).logits, expected)

    def test_on_the_same_row_the_later_one_counts_and_neither_is_merged(self):
        model = self.model([3, 5])
        model.base_model.set_adapter(["default", "b"])
        both = model.bare.model.embed_tokens(torch.tensor([3, 9]))
        assert torch.equal(both, torch.stack([rows_of(model, "b")[0], rows_of(model)[0]]))
        with pytest.raises(MergeError, match="both train the row of token 3 in model.embed_tokens"):
            model.merge_adapter()
        assert overlay_needed(model.bare).route.merged == ()

    def test_each_row_of_a_batch_by_its_own(self):
        model = self.model([3, 5])
        with torch.no_grad():
            alone = {"default": model(X).logits}
            model.set_adapter("b")
            alone["b"] = model(X).logits
            with model.disable_adapter():
                alone[None] = model(X).logits
            names = ["b", None, "default"]
            with overlay_needed(model.bare).route.serving(parts_of(names)):
                mixed = model(X).logits
        for row, name in enumerate(names):
            assert_close(mixed[row], alone[name][row])

    def test_on_some_tokens_of_a_batch(self):
        model = self.model([5])
        acting = torch.zeros(X.shape, dtype=torch.bool)
        acting[:, 4:] = True
        head, h = model.bare.lm_head, torch.randn(*X.shape, 32)
        with torch.no_grad(), overlay_needed(model.bare).route.serving({"default": Part(len(X), tokens=acting)}):
            mixed = head(h)
        with torch.no_grad():
            alone = head(h)
            base = F.linear(h, head.weight)
        assert torch.equal(mixed, torch.where(acting.unsqueeze(-1), alone, base))


def test_unloading_leaves_nothing():
    plain, fresh = adapted().unload(), tiny.llama(tied=True)
    for path, module in fresh.named_modules():
        found = plain.get_submodule(path)
        assert type(found) is type(module)
        assert set(vars(found)) == set(vars(module))
    assert torch.equal(plain(X).logits, fresh(X).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model = adapted()
    again = copied(model)
    assert torch.equal(again(X).logits, model(X).logits)
    bare = again.bare
    both = bare.lm_head.token_rows["default"], bare.model.embed_tokens.token_rows["default"]
    assert both[0] is both[1]


def test_compiling_in_one_graph():
    model = adapted()
    compiled = torch.compile(model.bare, backend="eager", fullgraph=True)
    assert_close(compiled(X).logits, model(X).logits)


def test_gradient_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.bare.enable_input_require_grads()
        model(X).logits.square().mean().backward()
        grads.append(rows_of(model).grad)
    assert_close(grads[0], grads[1])


def test_autocast():
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(X).logits
        logits.float().square().mean().backward()
    assert_close(logits.float(), model(X).logits, atol=0.1, rtol=0.1)
    assert rows_of(model).grad.isfinite().all()


def test_a_scaled_embedding():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    base = Tied()
    base.tokens = Gemma3TextScaledWordEmbedding(20, 6, padding_idx=0, embed_scale=2.5)
    base.head.weight = base.tokens.weight
    model = adapted(base, **TOY, trainable_token_indices=[3])
    rows = model.bare.tokens.token_rows["default"].trainable_tokens_delta
    assert_close(model.bare.tokens(torch.tensor([3])), 2.5 * rows)
    x = torch.tensor([[3, 4]])
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected)


class Shapes(TorchDispatchMode):
    """The shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.seen.add(tuple(out.shape))
        return out


def test_nothing_as_large_as_the_embedding_is_made():
    model = adapted()
    with Shapes() as shapes:
        model(X).logits.square().mean().backward()
    assert (*X.shape, 64) in shapes.seen
    assert not {(64, 32), (32, 64)} & shapes.seen


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"trainable_token_indices": [1, 64, 99]}, "has 64 rows, 0 to 63, so none for token 64, 99"),
            ({"trainable_token_indices": {"embed_token": [1]}}, r"did you mean embed_tokens \(1 layer\)"),
            ({"trainable_token_indices": {"norm": [1]}}, "matches nothing|LlamaRMSNorm is neither"),
            ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is in target_modules too"),
            ({"target_modules": ["lm_head"]}, r"lm_head \(tied to model.embed_tokens\) is in target_modules too"),
            ({"modules_to_save": ["embed_tokens"]}, "trained in full already"),
            (
                {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
                "needs the same tokens for both",
            ),
            ({"trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}}, "named twice"),
        ],
    )
    def test_settings(self, fields, message):
        base = tiny.llama(tied=True)
        with pytest.raises(TargetError, match=message):
            veneer.get_peft_model(base, config(**fields))
        assert all(p.requires_grad for p in base.parameters())

    @pytest.mark.parametrize("indices", [[1, 1], [-1], [], {"embed_tokens": []}, {"embed_tokens": [1, 1]}, [1.5]])
    def test_values(self, indices):
        if not indices:
            assert config(trainable_token_indices=indices).trainable_token_indices is None
            return
        with pytest.raises(veneer.errors.ConfigError, match="trainable_token_indices"):
            config(trainable_token_indices=indices)

    @pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
    def test_embeddings_that_do_more(self, options):
        with pytest.raises(TargetError, match=next(iter(options))):
            adapted(Tied(tied=False, **options), **TOY, trainable_token_indices=[1])

    def test_quantised_weights(self):
        base = Tied(tied=False)
        base.tokens.weight = nn.Parameter(torch.zeros(20, 6, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(TargetError, match="rows of tokens cannot be trained: .* quantised"):
            adapted(base, **TOY, trainable_token_indices=[1])

    def test_no_one_embedding(self):
        base = Tied()
        base.more = nn.Embedding(4, 6)
        with pytest.raises(TargetError, match="which embedding is meant cannot be told"):
            adapted(base, **TOY, trainable_token_indices=[1])

    def test_other_adapters_on_the_embedding(self):
        model = adapted()
        with pytest.warns(VeneerWarning), pytest.raises(AttachError, match="another adapter trains rows of"):
            model.add_adapter("b", config(target_modules=["embed_tokens"], trainable_token_indices=None))
        with pytest.warns(VeneerWarning), pytest.raises(AttachError, match="of which another adapter trains rows"):
            model.add_adapter("b", config(modules_to_save=["lm_head"], trainable_token_indices=None))
        with pytest.warns(VeneerWarning):
            model = adapted(target_modules=["embed_tokens"], trainable_token_indices=None)
        with pytest.raises(AttachError, match=r"another adapter adapts model\.embed_tokens"):
            model.add_adapter("b", config())
        assert list(model.peft_config) == ["default"]

    def test_padding_without_a_tied_head(self):
        with pytest.warns(VeneerWarning, match="token 0 is the padding"):
            adapted(tiny.llama(), trainable_token_indices=[0, 1])

    def test_broken_rows_are_not_merged(self):
        model = adapted()
        with torch.no_grad():
            rows_of(model)[0, 0] = float("nan")
        with pytest.raises(MergeError, match="NaN or infinity"):
            model.merge_adapter()
        assert overlay_needed(model.bare).originals == {}


def test_the_tensors_of_a_file():
    tensors = adapter_tensors(adapted().bare, "default")
    found = {key: tuple(value.shape) for key, value in tensors.items() if "lora_" not in key}
    assert found == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (3, 32)}


def test_adapters_with_rows_are_not_combined():
    model = adapted()
    with pytest.raises(veneer.errors.ConfigError, match="trainable_token_indices"):
        model.add_weighted_adapter(["default"], [1.0], "c", combination_type="linear")


def test_rows_do_not_go_with_an_invocation():
    with pytest.raises(veneer.errors.ConfigError, match="cannot go with alora_invocation_tokens"):
        config(alora_invocation_tokens=[1, 2])

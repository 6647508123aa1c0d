"""Embeddings: padding, max_norm, gradients by frequency, sparse bases, scaled ones, dropout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import DebertaConfig, DebertaModel
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.m2m_100.modeling_m2m_100 import M2M100ScaledWordEmbedding
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

import veneer
from tiny import shake
from veneer.errors import AttachError, MergeError, TargetError

IDS = torch.tensor([[1, 2, 2, 5], [2, 0, 6, 1]])
SCALED = [BartScaledWordEmbedding, M2M100ScaledWordEmbedding, Gemma3TextScaledWordEmbedding]


def adapted(layer, *, std=0.2, **fields):
    """(the bare layer, a shaken adapter over a copy of it)"""
    config = veneer.LoraConfig(**{"r": 3, "lora_alpha": 2, "target_modules": ["0"], **fields})
    ours = veneer.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    return layer, shake(ours, std=std).eval()


def parts(ours):
    """(the adapted layer, its A, B and the plain update of shape (V, O))"""
    layer = ours.get_base_model()[0]
    adapter = layer.adapters["default"]
    return layer, adapter.lora_A, adapter.lora_B, adapter.scale * (adapter.lora_B @ adapter.lora_A).T


def test_padding_gets_the_update_but_no_gradient():
    bare, ours = adapted(nn.Embedding(7, 5, padding_idx=0).double())
    _, A, _, update = parts(ours)
    y = ours(IDS)
    assert_close(y, bare(IDS) + update[IDS])
    y.square().sum().backward()
    assert A.grad[:, 0].abs().sum() == 0
    assert (A.grad[:, [1, 2, 5, 6]].abs().sum(0) > 0).all()


def test_gradients_are_divided_by_how_often_a_token_occurs():
    """For A as torch does for the weight of an embedding; B belongs to all tokens."""
    bare, ours = adapted(nn.Embedding(7, 5, scale_grad_by_freq=True).double())
    _, A, B, _ = parts(ours)
    seed = torch.randn(2, 4, 5, dtype=torch.float64)
    found = torch.autograd.grad((ours(IDS) * seed).sum(), [A, B])
    plain = F.embedding(IDS, A.T) @ B.T * (2 / 3)
    expected_A, expected_B = torch.autograd.grad((plain * seed).sum(), [A, B])
    count = torch.bincount(IDS.flatten(), minlength=7).clamp(min=1)
    assert count.max() == 3
    assert_close(found[0], expected_A / count)
    assert_close(found[1], expected_B)
    h = (A.T).detach().requires_grad_()
    (F.embedding(IDS, h, scale_grad_by_freq=True) @ B.detach().T * (2 / 3) * seed).sum().backward()
    assert_close(found[0], h.grad.T)


def test_the_adapter_of_a_sparse_embedding_has_dense_gradients():
    bare, ours = adapted(nn.Embedding(7, 5, sparse=True).double())
    layer, A, B, update = parts(ours)
    ours(IDS).square().sum().backward()
    found = A.grad.clone(), B.grad.clone()
    assert A.grad.layout == torch.strided
    (bare.weight.detach() + update)[IDS].square().sum().backward()
    assert_close(A.grad - found[0], found[0])
    assert_close(B.grad - found[1], found[1])
    assert layer.weight.grad is None


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
class TestMaxNorm:
    def layer(self, norm_type):
        torch.manual_seed(0)
        layer = nn.Embedding(7, 5, max_norm=1.5, norm_type=norm_type).double()
        with torch.no_grad():
            layer.weight[0] *= 0.1  # one row is short enough as it is
        return layer

    def test_the_base_shortens_its_own_rows_and_the_adapter_none(self, norm_type):
        bare, ours = adapted(self.layer(norm_type))
        layer, A, B, update = parts(ours)
        before = A.detach().clone(), B.detach().clone()
        assert_close(ours(IDS), bare(IDS) + update[IDS])
        assert torch.equal(layer.weight, bare.weight), "just what the base does without an adapter"
        assert torch.equal(A, before[0])
        assert torch.equal(B, before[1])

    def test_gradients_are_those_of_the_plain_update(self, norm_type):
        bare, ours = adapted(self.layer(norm_type))
        _, A, B, update = parts(ours)
        rows = bare(IDS).detach()
        expected = torch.autograd.grad((rows + update[IDS]).square().sum(), [A, B])
        found = torch.autograd.grad(ours(IDS).square().sum(), [A, B])
        for mine, true in zip(found, expected, strict=True):
            assert_close(mine, true)

    def test_merging_shortens_rows_that_no_call_has_seen_yet(self, norm_type):
        bare, ours = adapted(self.layer(norm_type), std=0)
        layer, A, B, _ = parts(ours)
        with torch.no_grad():
            A.copy_(-0.05 * torch.linalg.pinv(B) @ bare.weight.T)  # points inwards
        never_called = copy.deepcopy(ours)
        weight = layer.weight.detach().clone()
        everything = torch.arange(7)
        ours.merge_adapter()
        assert_close(ours(everything), never_called(everything))
        ours.unmerge_adapter()
        assert torch.equal(layer.weight, weight)
        merged = ours.merge_and_unload()
        assert_close(merged(everything), never_called(everything))

    def test_an_adapter_that_does_nothing_merges(self, norm_type):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            _, ours = adapted(self.layer(norm_type).to(dtype), std=0)
            expected = ours(IDS)
            assert_close(ours.merge_and_unload()(IDS), expected)

    def test_merged_rows_that_would_be_shortened_are_refused(self, norm_type):
        _, ours = adapted(self.layer(norm_type), std=1.0)
        before = parts(ours)[0].weight.detach().clone()
        with pytest.raises(MergeError, match=r"0: \d row\(s\) would be longer than its max_norm=1.5"):
            ours.merge_and_unload()
        assert torch.equal(parts(ours)[0].weight, before)

    def test_dora_is_refused(self, norm_type):
        with pytest.raises(AttachError, match="0: use_dora: its max_norm=1.5 rewrites the weight"):
            adapted(self.layer(norm_type), use_dora=True)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("cls", SCALED)
def test_an_embed_scale_multiplies_the_update(cls, dora):
    torch.manual_seed(0)
    bare, ours = adapted(cls(7, 5, 0, embed_scale=2.5).double(), use_dora=dora)
    layer, _, _, update = parts(ours)
    W = bare.weight + update
    if dora:
        W = W * layer.adapters["default"].lora_magnitude_vector / W.norm(dim=0)
    with torch.no_grad():
        expected = ours(IDS)
        assert_close(expected, 2.5 * W[IDS])
        assert_close(ours.merge_and_unload()(IDS), expected)


@pytest.mark.parametrize("cls", SCALED)
def test_an_embed_scale_is_rounded_as_the_layer_rounds_it(cls):
    """Gemma 3 in bfloat16 multiplies by a scale in bfloat16 (34 for a width of 1152), Bart by the number itself."""
    torch.manual_seed(0)
    layer = cls(7, 64, 0, embed_scale=1152**0.5).to(torch.bfloat16)
    bare, ours = adapted(layer)
    factor = 34.0 if cls is Gemma3TextScaledWordEmbedding else 1152**0.5
    _, _, _, update = parts(ours)
    exact = bare(IDS).double() + factor * update[IDS].double()
    assert (ours(IDS).double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    wide = copy.deepcopy(ours)
    with torch.no_grad():  # without the base's rows nothing hides the factor
        parts(wide)[0].weight.zero_()
    assert_close(wide(IDS), (factor * update[IDS]).to(torch.bfloat16), rtol=2**-8, atol=0)


def test_a_second_adapter_on_a_scaled_embedding():
    bare, ours = adapted(BartScaledWordEmbedding(7, 5, 0, embed_scale=2.5).double())
    ours.add_adapter("two", veneer.LoraConfig(r=2, target_modules=["0"]))
    ours.set_adapter("two")
    shake(ours)
    adapter = ours.get_base_model()[0].adapters["two"]
    update = adapter.scale * (adapter.lora_B @ adapter.lora_A).T
    assert_close(ours(IDS), bare(IDS) + 2.5 * update[IDS])


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_a_scaled_embedding_drops_whole_tokens(dora):
    torch.manual_seed(0)
    bare, ours = adapted(Gemma3TextScaledWordEmbedding(7, 5, 0, 2.5).double(), lora_dropout=0.5, use_dora=dora)
    whole = ours(IDS)
    ours.train()
    with torch.no_grad():
        difference, full = ours(IDS) - bare(IDS), whole - bare(IDS)
    kept = (difference.abs().sum(-1) > 1e-12).unsqueeze(-1)
    assert 0 < kept.sum() < IDS.numel()
    assert_close(difference, torch.where(kept, 2 * full, torch.zeros_like(full)))


@pytest.mark.parametrize(
    "layer",
    [
        T5Gemma2TextScaledWordEmbedding(7, 5, 0, embed_scale=2.0),  # swaps a row for a parameter of its own
        BartLearnedPositionalEmbedding(7, 5),
    ],
)
def test_embeddings_that_compute_something_else_are_refused(layer):
    with pytest.raises(TargetError, match=f"{type(layer).__name__} computes more than a look-up and a scale"):
        adapted(layer)


def test_an_embed_scale_that_is_no_number_is_refused():
    layer = BartScaledWordEmbedding(7, 5, 0)
    layer.embed_scale = torch.ones(5)
    with pytest.raises(TargetError, match="computes more than a look-up and a scale"):
        adapted(layer)


def test_an_embedding_whose_weight_is_read_is_refused():
    config = DebertaConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, relative_attention=True
    )
    with pytest.raises(TargetError, match="rel_embeddings cannot be adapted: DebertaEncoder reads its weight without"):
        veneer.get_peft_model(DebertaModel(config), veneer.LoraConfig(target_modules=["rel_embeddings"]))

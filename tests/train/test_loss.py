"""The loss of a batch: transformers' own, whichever way it is taken, and taken in the head only where that is right."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.tiny_chat import model as tiny_llama
from veneer import LoraConfig
from veneer.integrations.transformers import add_adapter
from veneer.train.loss import plain_head, summed_loss

SMALL = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(kind: str, **config) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SMALL, **config)).eval()


def adapted(model: nn.Module, **config) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    add_adapter(model, LoraConfig(r=4, init_lora_weights=False, **config), generator=generator)  # type: ignore
    return model


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Four rows: a prompt and an answer, one with a gap, one that is all learned, one of which nothing is."""
    ids_BT = torch.randint(3, 67, (4, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.arange(9) < torch.tensor([[9], [7], [5], [9]])
    learned_BT = mask_BT & torch.tensor(
        [[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 1, 1, 0, 0], [1] * 9, [0] * 9], dtype=torch.bool
    )
    inputs = {"input_ids": ids_BT.where(mask_BT, 0), "attention_mask": mask_BT.long()}
    return inputs, ids_BT.where(learned_BT, -100)


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))


PLAIN = {
    "Llama": {},
    "tied Llama": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Mistral": {},
    "Phi": {},  # its head has a bias
    "Gemma2": {"final_logit_softcapping": None, "query_pre_attn_scalar": 8},
}
MORE = {
    "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
}
CASES = [(kind, config, True) for kind, config in PLAIN.items()] + [
    (kind, config, False) for kind, config in MORE.items()
]


@pytest.mark.parametrize(("kind", "config", "plain"), CASES, ids=[f"{kind}-{plain}" for kind, _, plain in CASES])
def test_loss_and_gradients_are_those_of_the_models_own_loss(kind: str, config: dict, plain: bool) -> None:
    model = adapted(made(kind.split()[-1], **config))
    head = plain_head(model)
    assert (head is not None) == plain
    inputs, labels = batch()
    own = model(**inputs, labels=labels).loss
    learned = (labels[:, 1:] != -100).sum()
    for way in (head, None):
        total, _ = summed_loss(model, inputs, labels, way)
        torch.testing.assert_close(total / learned, own)
        torch.testing.assert_close(gradients(total / learned, model), gradients(own, model), rtol=1e-4, atol=1e-6)
        own = model(**inputs, labels=labels).loss


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}},
    ],
    ids=["adapted", "saved", "some rows"],
)
def test_a_head_that_learns_is_called(config: dict) -> None:
    model = adapted(tiny_llama(), **config)
    assert plain_head(model) is None
    inputs, labels = batch()
    gradient = gradients(summed_loss(model, inputs, labels, None)[0], model)
    assert all(value.any() for name, value in gradient.items() if "lm_head" in name)


def test_a_head_with_a_forward_or_hooks_of_its_own_is_called() -> None:
    model = tiny_llama()
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    assert plain_head(model) is None
    handle.remove()
    model.lm_head.forward = lambda h: nn.functional.linear(h, model.lm_head.weight) * 2
    assert plain_head(model) is None
    del model.lm_head.forward
    assert plain_head(model) is model.lm_head


class InPlace(nn.Module):
    """Scales its logits where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(self.embed(input_ids)).mul_(2))


def test_logits_changed_in_place_are_noticed() -> None:
    assert plain_head(InPlace()) is None


def test_finding_out_leaves_everything_as_it_was() -> None:
    model = adapted(tiny_llama(), lora_dropout=0.5).train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert plain_head(model) is model.lm_head
    assert torch.equal(torch.get_rng_state(), random)
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(model.state_dict(), before)


def test_the_head_is_itself_again_after_an_error() -> None:
    model = tiny_llama()
    inputs, labels = batch()
    with pytest.raises((IndexError, RuntimeError)):
        summed_loss(model, inputs, labels.where(labels == -100, 10_000), model.lm_head)
    assert "forward" not in vars(model.lm_head)


class MostLogits(TorchDispatchMode):
    """The most rows of any product as wide as the vocabulary."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and found.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, found.numel() // self.vocabulary)
        return found


def test_only_tokens_with_a_label_have_logits() -> None:
    model = adapted(made("Llama"))
    inputs, labels = batch()
    learned = int((labels[:, 1:] != -100).sum())
    found = {}
    for head in (plain_head(model), None):
        with MostLogits(67) as seen:
            summed_loss(model, inputs, labels, head)[0].backward()
        found[head is not None] = seen.rows
    assert found == {True: learned, False: 4 * 8}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing_are_the_same(reentrant: bool) -> None:
    model = adapted(tiny_llama(), lora_dropout=0.5).train()
    inputs, labels = batch()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model.zero_grad()
        summed_loss(model, inputs, labels, model.lm_head)[0].backward()  # the reentrant kind knows no other call
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*found)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    model = adapted(tiny_llama().to(torch.bfloat16))
    head = plain_head(model)
    assert head is not None
    inputs, labels = batch()
    (one, _), (other, _) = (summed_loss(model, inputs, labels, way) for way in (head, None))
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)

"""Convolutions and scaled embeddings here and in PEFT, in models that have them: vision, speech, a U-Net, Gemma 3."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Conv1d
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import tiny
import veneer
from parity import oracle
from parity.test_parity import TIGHT, our_gradients
from veneer.model.tensors import adapter_tensors

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(**SMALL, initializer_range=0.2, image_size=12, patch_size=4, num_labels=3)
    ).eval()


def whisper() -> nn.Module:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=6,
        classifier_proj_size=16,
        num_labels=3,
        apply_spec_augment=False,
        dropout=0.0,
        init_std=0.2,
    )
    return WhisperForAudioClassification(config).eval()


def gemma3() -> nn.Module:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SMALL,
        vocab_size=64,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return Gemma3ForCausalLM(config).eval()


class UNet(nn.Module):
    """Down by a stride, through a bottleneck of size one, up again, and over to the other side."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups)
        self.middle = nn.Conv2d(12, 12, 1, bias=False)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 4, (3, 5), padding="same")

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.stem(x))
        low = torch.tanh(self.middle(torch.tanh(self.down(skip))))
        return self.out(torch.cat([skip, torch.tanh(self.up(low))], dim=1))


class Voxels(nn.Module):
    """Convolutions in three dimensions and in one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.volume = nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1))
        self.line = nn.Conv1d(6, 5, 3, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        return self.line(torch.tanh(self.volume(x)).flatten(2))


class Words(nn.Module):
    """An embedding with a scale, one whose gradients count by frequency, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scaled = BartScaledWordEmbedding(20, 16, 0, embed_scale=4.0)
        self.counted = nn.Embedding(20, 16, scale_grad_by_freq=True)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scaled(ids) + self.counted(ids)))


def usable(theirs: Any) -> Any:
    """Whisper asks its convolutions for their stride, which PEFT's wrapper does not have: lend it."""
    for module in theirs.modules():
        if isinstance(module, Conv1d):
            module.stride = module.base_layer.stride
    return theirs.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


FAMILIES: dict[str, tuple[Any, Any, list[str]]] = {
    "vit": (vit, lambda model: model(noise(2, 3, 12, 12)).logits, ["projection", "k_proj"]),
    "whisper": (whisper, lambda model: model(noise(2, 8, 12)).logits, ["conv1", "conv2", "q_proj"]),
    "gemma3": (gemma3, lambda model: model(tiny.ids()).logits, ["embed_tokens", "q_proj"]),
    "unet": (UNet, lambda model: model(noise(2, 4, 8, 8)), ["stem", "down", "middle", "out"]),
    "grouped": (lambda: UNet(groups=2), lambda model: model(noise(2, 4, 8, 8)), ["stem", "down", "out"]),
    "voxels": (Voxels, lambda model: model(noise(2, 4, 3, 4, 3)), ["volume", "line"]),
    "words": (Words, lambda model: model(tiny.ids(20)), ["scaled", "counted"]),
}
WITH_EMBEDDINGS = ("gemma3", "words")
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "bias-of-its-own": {"lora_bias": True},
    "biases": {"bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random-start": {"init_lora_weights": False},
}
CASES = [
    pytest.param(family, fields, id=f"{family}-{name}")
    for family in FAMILIES
    for name, fields in VARIANTS.items()
    if not (family in WITH_EMBEDDINGS and name in ("bias-of-its-own", "biases", "gaussian"))
    and not (family == "grouped" and name == "dora")  # refused here: PEFT's is not the norm of any weight
    and not (family == "unet" and name == "bias-of-its-own")  # its bottleneck has none to merge into
]
case = pytest.mark.parametrize(("family", "fields"), CASES)


def made_alike(family: str, fields: dict[str, Any], tmp_path: Any) -> tuple[Any, Any, Any]:
    make, _, targets = FAMILIES[family]
    base = make()
    fields = {"r": 4, "lora_alpha": 6, "target_modules": targets, **fields}
    theirs = usable(tiny.shake(oracle.made_by_peft(base, **fields)))
    folder = oracle.save(theirs, tmp_path / "theirs")
    return base, theirs, veneer.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()


@case
def test_the_same_adapter(family, fields, tmp_path):
    """Outputs, gradients, a step, the file and the merged weights."""
    base, theirs, ours = made_alike(family, fields, tmp_path)
    run = FAMILIES[family][1]
    expected = run(theirs)
    assert not torch.allclose(expected, run(base), atol=1e-2), "the adapter does nothing: a void test"
    found = run(ours)
    assert_close(found, expected, **TIGHT)

    expected.square().mean().backward()
    found.square().mean().backward()
    true, mine = oracle.gradients(theirs), our_gradients(ours)
    assert mine.keys() == true.keys()
    for key, gradient in true.items():
        assert_close(mine[key].view_as(gradient), gradient, **TIGHT, msg=lambda text, key=key: f"{key}: {text}")
    for model in (theirs, ours):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()

    with torch.no_grad():
        expected = run(theirs)
        assert_close(run(ours), expected, **TIGHT)
        ours.save_pretrained(tmp_path / "ours")
        read = usable(oracle.read_by_peft(base, tmp_path / "ours"))
        assert_close(run(read), expected, **TIGHT)
        assert {key: value.shape for key, value in oracle.values(read).items()} == {
            key: value.shape for key, value in oracle.values(theirs).items()
        }
        if family == "grouped":
            return
        true = oracle.quietly(theirs.merge_and_unload).state_dict()
        merged = ours.merge_and_unload()
        assert list(merged.state_dict()) == list(base.state_dict())
        assert_close(run(merged), expected, rtol=1e-3, atol=1e-4)
        for name, value in merged.state_dict().items():
            assert_close(value, true[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@case
def test_a_new_adapter_has_the_same_tensors_as_pefts(family, fields):
    make, _, targets = FAMILIES[family]
    base, fields = make(), {"r": 4, "target_modules": targets, **fields}
    theirs = oracle.made_by_peft(base, **fields)
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**fields))
    found = adapter_tensors(ours.get_base_model(), "default")
    expected = {key: tuple(value.shape) for key, value in oracle.values(theirs).items()}
    assert {key: tuple(value.shape) for key, value in found.items()} == expected
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["unet", "voxels"])
def test_dropout_is_pefts(family, dora, tmp_path):
    """From one seed, as both draw one mask a layer in the order of the layers."""
    _, theirs, ours = made_alike(family, {"lora_dropout": 0.3, "use_dora": dora}, tmp_path)
    run, outputs = FAMILIES[family][1], []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(2)
        outputs.append(run(model))
    assert not torch.allclose(outputs[0], run(theirs.eval()), atol=1e-3)
    assert_close(outputs[1], outputs[0], **TIGHT)
    for output in outputs:
        output.square().mean().backward()
    expected, found = oracle.gradients(theirs), our_gradients(ours)
    for key, gradient in expected.items():
        assert_close(found[key].view_as(gradient), gradient, **TIGHT, msg=lambda text, key=key: f"{key}: {text}")

import warnings

import peft
import pytest
import torch
from safetensors import safe_open

from targets.models import materialised
from veneer.storage import keys


def written_by_peft(folder, model, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(materialised(model), peft.LoraConfig(**fields)).save_pretrained(str(folder))
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as opened:
        return set(opened.keys())


Q = "model.layers.{}.self_attn.q_proj"
QUERY = "bert.encoder.layer.{}.attention.self.query"
AB = ("lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        ("llama", {"target_modules": ["q_proj"]}, {keys.factor(Q.format(i), n) for i in range(4) for n in AB}),
        (
            "llama",
            {"target_modules": ["3.self_attn.q_proj"], "use_dora": True},
            {*(keys.factor(Q.format(3), n) for n in AB), keys.magnitude(Q.format(3))},
        ),
        (
            "llama",
            {"target_modules": ["embed_tokens"]},
            {
                *(keys.factor("model.embed_tokens", n) for n in ("lora_embedding_A", "lora_embedding_B")),
                keys.base_weight("model.embed_tokens"),
            },
        ),
        (
            "bert classifier",
            {"target_modules": ["0.attention.self.query"], "task_type": "SEQ_CLS"},
            {
                *(keys.factor(QUERY.format(0), n) for n in AB),
                keys.saved("classifier", "weight"),
                keys.saved("classifier", "bias"),
            },
        ),
        (
            "bert classifier",
            {"target_modules": ["query"], "bias": "lora_only"},
            {
                *(keys.factor(QUERY.format(i), n) for i in range(2) for n in AB),
                *(keys.bias(QUERY.format(i), adapted=True) for i in range(2)),
            },
        ),
    ],
)
def test_names_are_those_that_peft_writes(tmp_path, model, fields, expected):
    assert written_by_peft(tmp_path, model, **fields) == expected


def test_all_biases_are_named_as_peft_names_them(tmp_path):
    model = "bert classifier"
    found = written_by_peft(tmp_path, model, target_modules=["query"], bias="all", modules_to_save=["classifier"])
    layers = {QUERY.format(i) for i in range(2)}
    biases = {n.removesuffix(".bias") for n, _ in materialised(model).named_parameters() if n.endswith(".bias")}
    expected = {keys.bias(path, adapted=path in layers) for path in biases - {"classifier"}}
    expected |= {keys.factor(path, name) for path in layers for name in AB}
    expected |= {keys.saved("classifier", "weight"), keys.saved("classifier", "bias")}
    assert found - expected == set(keys.inside_saved("classifier", "bias"))
    assert expected <= found


def test_the_names_of_parameters_torch_shows(tmp_path):
    linear = torch.nn.Linear(2, 2)
    names = [name for name, _ in linear.named_parameters()]
    assert [keys.saved("head", name) for name in names] == [
        "base_model.model.head.weight",
        "base_model.model.head.bias",
    ]

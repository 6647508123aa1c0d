import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from targets.models import materialised, skeleton
from veneer import LoraConfig, get_peft_model
from veneer.targets import preview


def test_the_numbers_of_llama_2_7b():
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                pad_token_id=0,
            )
        )
    found = preview(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    assert (found.trainable, found.total, len(found.sites)) == (4_194_304, 6_742_609_920, 64)
    assert found.linear_layers == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 32
    )


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4}),
        ("llama", {"use_dora": True, "rank_pattern": {"q_proj": 3}}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
        ("bert classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        ("bert classifier", {"target_modules": ["query"], "bias": "all"}),
        ("bert classifier", {"target_modules": ["query"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
        ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0]}),
    ],
)
def test_the_counts_are_those_of_the_adapted_model(model, fields):
    config = LoraConfig(**fields)
    found = preview(skeleton(model), config)
    adapted = get_peft_model(materialised(model), config)
    assert found.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert (found.trainable, found.total) == adapted.get_nb_trainable_parameters()

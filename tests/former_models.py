"""Models as transformers 4 had them: the module trees only, with the names and matrices of that time.

So that PEFT itself writes an adapter file with them, and merges it. The weights are those of a model of today.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import tiny
import tiny_moe
import veneer


def tree(weights: Mapping[str, Tensor]) -> nn.Module:
    """A tree of modules with a linear layer (or, for `embed_tokens`, an embedding) at each path."""
    root = nn.Module()
    for path, weight in weights.items():
        *above, last = path.split(".")
        owner = root
        for name in above:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        rows, columns = weight.shape
        layer = nn.Embedding(rows, columns) if last == "embed_tokens" else nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(weight.detach().clone())
        owner.add_module(last, layer)
    return root


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of a model or a tree, by the paths of their layers."""
    return {name.removesuffix(".weight"): value for name, value in model.named_parameters() if value.dim() == 2}


class Experts:
    """How a family named its experts and how it does now that those of a layer lie in two parameters."""

    def __init__(self, block: str, gate: str, up: str, down: str) -> None:
        self.block, self.gate, self.up, self.down = block, gate, up, down

    def before(self, model: nn.Module) -> dict[str, Tensor]:
        """The matrices of a model of today by the paths they had."""
        found = {}
        for name, value in model.named_parameters():
            path = name.replace(".mlp.", f".{self.block}.").removesuffix(".weight")
            owner, _, own = path.rpartition(".")
            if own == "gate_up_proj" and value.dim() == 3:
                for e, W in enumerate(value):
                    gate, up = W.chunk(2)
                    found |= {f"{owner}.{e}.{self.gate}": gate, f"{owner}.{e}.{self.up}": up}
            elif own == "down_proj" and value.dim() == 3:
                found |= {f"{owner}.{e}.{self.down}": W for e, W in enumerate(value)}
            elif value.dim() == 2:
                found[path] = value
        return found

    def today(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of `model` with these weights, given by the paths they had."""
        state = dict(model.state_dict())
        for name, value in model.named_parameters():
            path = name.replace(".mlp.", f".{self.block}.").removesuffix(".weight")
            owner, _, own = path.rpartition(".")
            if value.dim() == 2:
                state[name] = weights[path]
            elif own == "gate_up_proj":
                gates, ups = (
                    [weights[f"{owner}.{e}.{one}"] for e in range(len(value))] for one in (self.gate, self.up)
                )
                state[name] = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
            elif own == "down_proj":
                state[name] = torch.stack([weights[f"{owner}.{e}.{self.down}"] for e in range(len(value))])
        return state


class Prefixes:
    """How a family began its names: {beginning now: beginning then}, the first that fits counts."""

    def __init__(self, then: Mapping[str, str]) -> None:
        self.then = then

    def path(self, now: str) -> str:
        """The path that a layer had."""
        start = next((one for one in self.then if now.startswith(one)), "")
        return self.then.get(start, "") + now.removeprefix(start)

    def before(self, model: nn.Module) -> dict[str, Tensor]:
        """The matrices of a model of today by the paths they had."""
        return {self.path(path): value for path, value in weights_of(model).items()}

    def today(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of `model` with these weights, given by the paths they had."""
        return {**model.state_dict(), **{f"{now}.weight": weights[self.path(now)] for now in weights_of(model)}}


MIXTRAL = Experts("block_sparse_moe", "w1", "w3", "w2")
QWEN = Experts("mlp", "gate_proj", "up_proj", "down_proj")
LLAVA = Prefixes(
    {
        "model.language_model.": "language_model.model.",
        "lm_head": "language_model.lm_head",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.": "",
    }
)
QWEN_VL = Prefixes({"model.language_model.": "model.", "model.visual.": "visual."})

_TEXT = {name: value for name, value in tiny_moe.SMALL.items() if name != "num_experts_per_tok"}


def deepseek() -> DeepseekV3ForCausalLM:
    """The first layer without experts; those of the others beside a shared one."""
    torch.manual_seed(0)
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    routed = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**tiny_moe.SMALL, **latent, **routed, moe_intermediate_size=12)
    ).eval()


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision},
        image_token_index=3,
    )
    return LlavaForConditionalGeneration(config).eval()


def qwen_vl() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**_TEXT, "bos_token_id": 0, "eos_token_id": 1, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def exact(model: nn.Module) -> Any:
    """The model in float64, with the way to compute experts that can do it."""
    model.config._experts_implementation = "eager"
    return model.double()


def old_file(model: nn.Module, family: Experts | Prefixes, folder: Path, **fields: Any) -> Path:
    """A file with the names of old for an adapter over `model`, with random values."""
    torch.manual_seed(0)
    adapted = veneer.get_peft_model(
        tree(family.before(model)), veneer.LoraConfig(**{"r": 2, "lora_alpha": 6, **fields})
    )
    tiny.shake(adapted).save_pretrained(folder)
    return folder

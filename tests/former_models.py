"""Models as transformers 4 had them: the module trees only, with the names and matrices of that time.

So that PEFT itself writes an adapter file with them, and merges it. The weights are those of a model of today.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
    """How a family names its experts: before, and now that those of a layer lie in two parameters."""

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
                pairs = [(weights[f"{owner}.{e}.{self.gate}"], weights[f"{owner}.{e}.{self.up}"]) for e in range(len(value))]
                state[name] = torch.stack([torch.cat(pair) for pair in pairs])
            elif own == "down_proj":
                state[name] = torch.stack([weights[f"{owner}.{e}.{self.down}"] for e in range(len(value))])
        return state


MIXTRAL = Experts("block_sparse_moe", "w1", "w3", "w2")
QWEN = Experts("mlp", "gate_proj", "up_proj", "down_proj")

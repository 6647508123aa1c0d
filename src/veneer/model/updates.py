"""What one adapter adds to one weight, as factors: all of it, whatever start or magnitude the adapter has.

Shapes: I in, O out, R rank.
"""

import torch
from torch import Tensor, nn

from veneer.functional.combine import Update
from veneer.layers.adapter import Adapter
from veneer.layers.weights import read
from veneer.model.overlay import overlay_needed
from veneer.targets import Site

# Settings under which an adapter is more than an update of each of its weights, with what else it is.
_MORE = {
    "target_parameters": "it adapts parameters that hold several matrices each (fused experts)",
    "trainable_token_indices": "it trains rows of an embedding in full",
    "alora_invocation_tokens": "it acts on some tokens only",
    "layer_replication": "its layers share their weights with others",
    "ensure_weight_tying": "it keeps the embeddings tied",
}


def why_not_update(model: nn.Module, name: str) -> list[str]:
    """Why adapter `name` is not just an update of each of its weights; empty if it is."""
    overlay = overlay_needed(model)
    config = overlay.configs[name]
    problems = [f"adapter {name}: {why} ({field})" for field, why in _MORE.items() if getattr(config, field)]
    found = next((site for site in overlay.resolutions[name].sites if site.by_weight), None)
    if found is not None:
        problems.append(f"adapter {name}: it adapts {found.parameter} of {found.path}, which is read and never called")
    if name in overlay.bases:
        problems.append(
            f"adapter {name}: it goes with base weights of its own (init_lora_weights={config.init_lora_weights!r})"
        )
    return problems


def is_product(site: Site) -> bool:
    """Whether the update is a product of factors. DoRA's is not: its magnitude turns the whole weight."""
    return not site.dora


@torch.no_grad()
def update_of(model: nn.Module, site: Site, adapter: Adapter) -> Update:
    """The update at the scale the adapter has now; of DoRA, W' - W times the identity: a product of rank O.

    Raises MergeError if DoRA's weight cannot be read.
    """
    if is_product(site):
        A, B = adapter.factors()
        return Update(A.detach(), B.detach(), float(adapter.scale))
    D_OI = difference_made(model, site, adapter).to(torch.promote_types(adapter.lora_A.dtype, torch.float32))
    (_, *inputs), (_, _, *ones) = site.factors
    identity = torch.eye(D_OI.shape[0], dtype=D_OI.dtype, device=D_OI.device)
    return Update(D_OI.reshape(-1, *inputs), identity.reshape(*identity.shape, *ones))


@torch.no_grad()
def difference_made(model: nn.Module, site: Site, adapter: Adapter) -> Tensor:
    """W' - W, where W' is the weight with the adapter in it, as an (O, I) matrix: in float64 on a CPU, else float32."""
    layer = model.get_submodule(site.path)
    weight = site.kind.as_used(layer, read(layer, site.parameter))
    W = weight.to(torch.float64 if weight.device.type == "cpu" else torch.float32)
    return site.kind.to_matrix(adapter.merged(W, W) - W)

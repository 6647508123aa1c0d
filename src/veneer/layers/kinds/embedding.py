"""`torch.nn.Embedding`: W one-hot. Stored as (V, O), so the matrix is its transpose. O out, R rank, V vocabulary.

Dropout of a one-hot input drops a token's whole update, or keeps it.
"""

import torch
from torch import Tensor, nn

from veneer.functional import lowrank
from veneer.layers.kinds.kind import Kind, Layer, Number, Shape


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.embedding_dim, layer.num_embeddings


def _update(layer: Layer, ids: Tensor, A_RV: Tensor, B_OR: Tensor, scale: Number, p: float) -> Tensor:
    u = lowrank.update_embedding(ids, A_RV, B_OR, scale, padding_idx=layer.padding_idx)
    return u if p == 0 else lowrank.drop_whole_tokens(u, p)


def _base_update(
    layer: Layer, ids: Tensor, y: Tensor, W_OV: Tensor, A_RV: Tensor, B_OR: Tensor, scale: Number, p: float
) -> tuple[Tensor, Tensor]:
    u = lowrank.update_embedding(ids, A_RV, B_OR, scale, padding_idx=layer.padding_idx)
    if p == 0:
        return y, u
    both = lowrank.drop_whole_tokens(torch.cat([y.to(u.dtype), u], dim=-1), p)
    base, u = both.chunk(2, dim=-1)
    return base, u


def _to_matrix(W_VO: Tensor) -> Tensor:
    return W_VO.T


def _from_matrix(W_OV: Tensor, shape: Shape) -> Tensor:
    return W_OV.T


def _refuse(layer: Layer) -> str | None:
    if layer.max_norm is not None:
        return "its max_norm rewrites the weight in every forward pass, which is not available yet"
    if layer.scale_grad_by_freq:
        return "its scale_grad_by_freq scales gradients by how often a token occurs, which is not available yet"
    owner = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls) and issubclass(cls, nn.Embedding))
    if owner is not nn.Embedding:
        return f"{owner.__name__} computes more than a look-up (a scale, say), which is not available yet"
    return None


EMBEDDING = Kind(
    "embedding",
    _dims,
    update=_update,
    base_update=_base_update,
    to_matrix=_to_matrix,
    from_matrix=_from_matrix,
    inits=("embedding_default", "normal_both"),
    linear=False,
    by_matrix=False,
    bias=False,
    on_disk=("lora_embedding_A", "lora_embedding_B"),
    refuse=_refuse,
)

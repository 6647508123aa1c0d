"""`torch.nn.Embedding`: W one-hot. Stored as (V, O), so the matrix is its transpose. O out, R rank, V vocabulary.

Dropout of a one-hot input drops a token's whole update, or keeps it. A layer that multiplies its rows by an
`embed_scale` multiplies the update too. `max_norm` is a matter of the base alone: its forward shortens its own rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from veneer.functional import lowrank
from veneer.layers.kinds.kind import Kind, Layer, Number, Shape, owner_of


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.embedding_dim, layer.num_embeddings


def _update(layer: Layer, ids: Tensor, A_RV: Tensor, B_OR: Tensor, scale: Number, p: float) -> Tensor:
    u = _whole_update(layer, ids, A_RV, B_OR, scale)
    return u if p == 0 else lowrank.drop_whole_tokens(u, p)


def _base_update(
    layer: Layer, ids: Tensor, y: Tensor, W_OV: Tensor, A_RV: Tensor, B_OR: Tensor, scale: Number, p: float
) -> tuple[Tensor, Tensor]:
    u = _whole_update(layer, ids, A_RV, B_OR, scale)
    if p == 0:
        return y, u
    both = lowrank.drop_whole_tokens(torch.cat([y.to(u.dtype), u], dim=-1), p)
    base, u = both.chunk(2, dim=-1)
    return base, u


def _whole_update(layer: Layer, ids: Tensor, A_RV: Tensor, B_OR: Tensor, scale: Number) -> Tensor:
    return lowrank.update_embedding(
        ids,
        A_RV,
        B_OR,
        scale * _factor(layer),
        padding_idx=layer.padding_idx,
        scale_grad_by_freq=layer.scale_grad_by_freq,
    )


def _factor(layer: Layer) -> Number:
    """What the layer multiplies its rows by, rounded as the layer rounds it."""
    if owner_of(layer, "forward", (nn.Embedding,)) is nn.Embedding:
        return 1.0
    factor = layer.embed_scale
    if not isinstance(factor, Tensor):
        return factor
    dtype = layer.weight.dtype
    return factor.to(dtype).to(torch.promote_types(dtype, torch.float32))


def _to_matrix(W_VO: Tensor) -> Tensor:
    return W_VO.T


def _from_matrix(W_OV: Tensor, shape: Shape) -> Tensor:
    return W_OV.T


def _as_used(layer: Layer, W_VO: Tensor) -> Tensor:
    """The weight after every row was looked up once: rows longer than `max_norm` are shortened then, in place."""
    if layer.max_norm is None:
        return W_VO
    every = torch.arange(W_VO.shape[0], device=W_VO.device)
    return torch.embedding_renorm_(W_VO.detach().clone(), every, layer.max_norm, layer.norm_type)


def _refuse(layer: Layer) -> str | None:
    owner = owner_of(layer, "forward", (nn.Embedding,))
    if owner is nn.Embedding or _only_scales(layer):
        return None
    return f"{owner.__name__} computes more than a look-up and a scale, so what an adapter would add cannot be told"


def _only_scales(layer: Layer) -> bool:
    """Whether a forward of its own can be a look-up times `embed_scale`, as in Gemma 3 and Bart: it has nothing else
    to compute with."""
    factor = getattr(layer, "embed_scale", None)
    is_number = isinstance(factor, int | float) or (isinstance(factor, Tensor) and factor.numel() == 1)
    weight_alone = layer._parameters.keys() == {"weight"} and layer._buffers.keys() <= {"embed_scale"}
    return is_number and weight_alone and layer._modules.keys() <= {"adapters"}


def _clash(layer: Layer, site: Any) -> str | None:
    if site.dora and layer.max_norm is not None:
        return (
            f"use_dora: its max_norm={layer.max_norm} rewrites the weight in every forward pass, and with it the norms "
            "that DoRA divides by; use plain LoRA, or leave the layer out"
        )
    return None


def _refuse_merge(layer: Layer, W_VO: Tensor) -> str | None:
    if layer.max_norm is None:
        return None
    # a row that was shortened may be longer by a rounding error, and is shortened by that again: no harm
    most = layer.max_norm * (1 + torch.finfo(W_VO.dtype).eps + 1e-5)
    exact = torch.promote_types(W_VO.dtype, torch.float32)
    longer = int((torch.linalg.vector_norm(W_VO, ord=layer.norm_type, dim=1, dtype=exact) > most).sum())
    if not longer:
        return None
    return (
        f"{longer} row(s) would be longer than its max_norm={layer.max_norm} and shortened again in the next forward "
        "pass; keep the adapter beside the weight"
    )


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
    as_used=_as_used,
    on_disk=("lora_embedding_A", "lora_embedding_B"),
    refuse=_refuse,
    clash=_clash,
    refuse_merge=_refuse_merge,
)

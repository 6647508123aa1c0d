"""Several adapters on one layer, each on its own rows of the batch, in as few products and copies as possible.

One after the other, each would copy the layer's output and wait for its own small products.
Shapes: N rows, T tokens, I in, O out, R rank, K adapters; G groups of S rows, each with one adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.functional import lowrank
from veneer.layers.adapter import Adapter
from veneer.layers.kinds import Layer
from veneer.layers.kinds.kind import linear_update
from veneer.layers.route import Part

Served = tuple[Adapter, Part]
_Alike = tuple[int, torch.dtype, float]


def serve_rows(served: Sequence[Served], x: Tensor, y: Tensor, layer: Layer) -> Tensor:
    """The layer's output y with each adapter on its part, which names rows. No row is in two parts."""
    together: dict[_Alike, list[Served]] = {}
    alone: list[Served] = []
    for adapter, part in served:
        key = _alike(adapter) if type(part) is Part and part.tokens is None else None
        (alone if key is None else together.setdefault(key, [])).append((adapter, part))
    for group in together.values():
        if len(group) == 1:
            alone += group
        else:
            y = _add_together(*zip(*group, strict=True), x=x, y=y)
    if not alone:
        return y
    changed = [part.changed(lambda x, y, adapter=adapter: adapter(x, y, layer), x, y) for adapter, part in alone]
    rows, new = zip(*changed, strict=True)
    return y.index_copy(0, torch.cat(rows), torch.cat(new))


def _alike(adapter: Adapter) -> _Alike | None:
    """What adapters must share to be multiplied together: they differ in A and B only. None if it cannot be."""
    plain = adapter.rule == "add" and adapter.kind.update is linear_update and isinstance(adapter.scale, float)
    if not plain or not adapter.casts_input or (adapter.training and adapter.dropout > 0):
        return None
    if adapter._parameters["lora_bias"] is not None or adapter._buffers["start_A"] is not None:
        return None
    A = adapter.lora_A
    return A.shape[0], A.dtype, adapter.scale  # type: ignore[return-value]


@dataclass(frozen=True)
class Groups:
    """The rows of K adapters in groups of one size, such that one batched product serves them all.

    grid     (G · S,) a row of the batch for each place; some rows fill places that nobody asks for
    adapter  (G,) which adapter a group has; None if each has its own, in order
    places   where in the grid the rows served are, in the order of `rows`
    rows     the rows served; None if all are, in order
    """

    size: int
    grid: Tensor
    adapter: Tensor | None
    places: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, parts: Sequence[Part], device: torch.device) -> "Groups":
        """Groups of the mean size, so that at most as many places again stay free."""
        rows_of = [part.rows.tolist() for part in parts if part.rows is not None]
        count = sum(map(len, rows_of))
        size = max(1, count // len(rows_of))
        grid: list[int] = []
        adapter: list[int] = []
        place_of: dict[int, int] = {}
        for k, rows in enumerate(rows_of):
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                place_of |= {row: len(grid) + i for i, row in enumerate(chunk)}
                grid += chunk + chunk[:1] * (size - len(chunk))
                adapter.append(k)
        rows = sorted(place_of)
        return cls(
            size,
            torch.tensor(grid, device=device),
            None if len(adapter) == len(rows_of) else torch.tensor(adapter, device=device),
            torch.tensor([place_of[row] for row in rows], device=device),
            None if len(rows) == parts[0].batch else torch.tensor(rows, device=device),
        )


def _add_together(adapters: Sequence[Adapter], parts: Sequence[Part], *, x: Tensor, y: Tensor) -> Tensor:
    """y with the update of K adapters that are alike, by one batched product for all their rows."""
    first, N = adapters[0], parts[0].batch
    parts[0].check(x)
    groups = parts[0].shared(parts, x.device, Groups.of)
    A_GRI = torch.stack([adapter.lora_A for adapter in adapters])
    B_GOR = torch.stack([adapter.lora_B for adapter in adapters])
    if groups.adapter is not None:
        A_GRI, B_GOR = A_GRI.index_select(0, groups.adapter), B_GOR.index_select(0, groups.adapter)
    x_NTI = x.reshape(N, -1, x.shape[-1])
    T, G = x_NTI.shape[1], len(A_GRI)
    if not torch.is_autocast_enabled(x.device.type):
        x_NTI = x_NTI.to(first.lora_A.dtype)
    x_GXI = x_NTI.index_select(0, groups.grid).reshape(G, groups.size * T, -1)
    u_GXO = lowrank.update_by_group(x_GXI, A_GRI, B_GOR, first.scale)
    u_NTO = u_GXO.reshape(G * groups.size, T, -1).index_select(0, groups.places).to(y.dtype)
    if groups.rows is None:
        return y + u_NTO.reshape(y.shape)
    return y.reshape(N, T, -1).index_add(0, groups.rows, u_NTO).reshape(y.shape)

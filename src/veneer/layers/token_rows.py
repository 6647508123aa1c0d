"""Single rows of an embedding trained in full (`trainable_token_indices`), for tokens that are new or rare.

The module's class is swapped (see swap.py). The weight stays as it is: an embedding's output gets the trained rows
where their tokens stand, and an output head tied to it their logits.
D width, K trained tokens, V vocabulary; `...` any leading dimensions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import MergeError
from veneer.layers import swap
from veneer.layers.kinds import Layer, Number
from veneer.layers.peft_names import WeightNames
from veneer.layers.route import Route
from veneer.layers.weights import check_writable, read
from veneer.layers.weights.offloaded import Resident

CHILD = "token_rows"


class TokenRows(Resident):
    """The rows of one adapter, of shape (K, D), and the tokens (K,) they stand for, in the config's order.

    Each row stands in place of the embedding's own; nothing is added to it.
    """

    trainable_tokens_delta: nn.Parameter
    tokens: Tensor
    ascending: Tensor
    places: Tensor

    def __init__(self, tokens: Sequence[int], rows_KD: Tensor) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(rows_KD)
        self.number(tokens, rows_KD.device)

    def number(self, tokens: Sequence[int], device: torch.device) -> None:
        """Say which tokens the rows stand for, anew where that was on the meta device."""
        numbers = torch.tensor(list(tokens))
        ascending, places = numbers.sort()
        for name, value in (("tokens", numbers), ("ascending", ascending), ("places", places)):
            self.register_buffer(name, value.to(device), persistent=False)

    def embedded(self, ids: Tensor, y: Tensor, layer: Layer, scale: Number | None = None) -> Tensor:
        """(token numbers, the embedding's output (..., D)) -> the output with the trained rows in it.

        scale  what the embedding multiplies its rows by
        """
        ids = ids.long().contiguous()
        found = torch.searchsorted(self.ascending, ids).clamp(max=len(self.ascending) - 1)
        hit = self.ascending[found] == ids
        rows = F.embedding(self.places[found], self.trainable_tokens_delta)
        if layer.padding_idx is not None:  # the embedding gives its padding no gradient, so neither does a row of it
            rows = torch.where((ids == layer.padding_idx).unsqueeze(-1), rows.detach(), rows)
        rows = rows.to(y.dtype) if scale is None else rows.to(y.dtype) * scale
        return torch.where(hit.unsqueeze(-1), rows, y)

    def projected(self, x: Tensor, y: Tensor, layer: Layer, *, in_place: bool) -> Tensor:
        """(the head's input (..., D), its logits (..., V)) -> the logits, those of the trained tokens by their rows.

        in_place  whether the given logits may be overwritten: they are often a model's largest tensor
        """
        rows = self.trainable_tokens_delta.to(layer.weight.dtype)
        bias = None if layer.bias is None else layer.bias[self.tokens]
        logits = F.linear(x, rows, bias).to(y.dtype)
        return (y.index_copy_ if in_place else y.index_copy)(-1, self.tokens, logits)

    def merged(self, W_VD: Tensor) -> Tensor:
        """The weight with the trained rows in place of its own, in its dtype."""
        return W_VD.index_copy(0, self.tokens, self.trainable_tokens_delta.to(W_VD.dtype))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the rows."""
        return "{} tokens of width {}".format(*self.trainable_tokens_delta.shape)


class RowsByAdapter(nn.ModuleDict):
    """The trained rows of one module, by adapter name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> TokenRows: ...


class WithRows(WeightNames, swap.Front):
    """Placed in front of a module's class: its output, with the rows of each adapter that acts."""

    word = "Rows"
    _veneer_child = CHILD
    token_rows: RowsByAdapter
    _veneer_route: Route

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with the rows of the route's plan in it; of two rows for one token, the later's."""
        y = super().forward(*args, **kwargs)
        if self._veneer_merged is not None:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        for step in self._veneer_route.plan:
            if step.name not in self.token_rows:
                continue
            rows = self.token_rows[step.name]
            if step.part is None:
                y = self._replace(rows, x, y, in_place=True)
            else:
                y = step.part.through(lambda x, y, rows=rows: self._replace(rows, x, y, in_place=False), x, y)
        return y

    def _veneer_merged_with(self, names: Sequence[str], originals: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": with_rows(self, [self.token_rows[name] for name in names], "this embedding")}

    def _replace(self, rows: TokenRows, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        raise NotImplementedError


class EmbeddingWithRows(WithRows):
    """The same for an embedding."""

    def _replace(self, rows: TokenRows, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        return rows.embedded(x, y, self)


class ScaledEmbeddingWithRows(WithRows):
    """The same for an embedding that multiplies its rows by `embed_scale`, as Gemma's does."""

    def _replace(self, rows: TokenRows, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        scale: Any = self.embed_scale
        return rows.embedded(x, y, self, scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


class HeadWithRows(WithRows):
    """The same for an output head, a linear layer whose weight has a row for each token."""

    def _replace(self, rows: TokenRows, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        return rows.projected(x, y, self, in_place=in_place)


def with_rows(layer: Layer, adapters: Sequence[TokenRows], what: str) -> Tensor:
    """The weight with the rows of adapters in it; `what` is what an error calls it. Raises MergeError."""
    check_writable(layer, "weight", what)
    W = read(layer).detach()
    with torch.no_grad():
        for rows in adapters:
            W = rows.merged(W)
    if not W.isfinite().all():
        raise MergeError(
            f"Not merged: {what} ({W.dtype}) would hold NaN or infinity: a trained row is broken, or too large for the "
            "dtype of the base."
        )
    return W


def has_rows(module: nn.Module) -> bool:
    """Whether an adapter trains rows of this module."""
    return isinstance(module, WithRows)


def why_no_rows(layer: nn.Module) -> str | None:
    """Why single rows of this module's weight cannot be trained; None if they can."""
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        return "its weight is no plain tensor of floating-point numbers (it is quantised, or computed from others)"
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Embedding):
        return f"{swap.base_class(layer).__name__} is neither an Embedding nor a Linear with a row for each token"
    if layer.max_norm is not None:
        return "its max_norm rewrites the weight in every forward pass"
    if layer.scale_grad_by_freq:
        return "its scale_grad_by_freq scales gradients by how often a token occurs"
    if _front_for(layer) is None:
        return f"{_owner_of_forward(layer).__name__} computes something other than a look-up"
    return None


def keep_rows(module: Layer, name: str, rows: TokenRows, route: Route) -> None:
    """Let adapter `name` act on a module by these rows. Tied modules are given the same.

    Raises AttachError if something other than accelerate has replaced the module's forward.
    """
    if not has_rows(module):
        front = _front_for(module)
        assert front is not None
        swap.lay_over(module, front, CHILD, RowsByAdapter(), route)
    module.token_rows[name] = rows
    route.may_train.add(name)


def drop_rows(module: Layer, name: str) -> None:
    """Forget adapter `name`'s rows. With the last ones the module is what it was before."""
    if has_rows(module):
        swap.forget(module, CHILD, name)


def _front_for(module: nn.Module) -> type[WithRows] | None:
    if isinstance(module, nn.Linear):
        return HeadWithRows
    owner = _owner_of_forward(module)
    if owner is nn.Embedding:
        return EmbeddingWithRows
    # transformers' classes of this name return the looked-up rows times embed_scale; one has a row of its own besides
    scaled = owner.__name__.endswith("ScaledWordEmbedding") and len(module._parameters) == 1
    return ScaledEmbeddingWithRows if scaled else None


def _owner_of_forward(layer: nn.Module) -> type:
    return next(cls for cls in type(layer).__mro__ if "forward" in vars(cls) and not issubclass(cls, swap.Front))

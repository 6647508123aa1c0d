"""One weight that will get, or has, an adapter: plain data."""

import math
from dataclasses import dataclass

from veneer.functional.lowrank import scaling
from veneer.layers.kinds import Kind, Shape


@dataclass(frozen=True)
class Site:
    """Where an adapter goes and what it looks like.

    path, parameter      the layer, and the name of its weight there
    kind                 what is known of such a layer
    shape                (O, I), (out, in) of the weight as a matrix
    factors              the shapes of A and B
    magnitude            the shape of DoRA's magnitude in an adapter file
    rank, alpha, rslora  R, and what its scale follows from
    dora, dropout        the rule, and how much of the input is dropped in training
    bias                 whether it has a bias of its own (`lora_bias`)
    tied_to              the path of the site whose adapter it shares, None for one of its own
    file_path            the path its tensors have in an adapter file, if it is not `path`
    """

    path: str
    kind: Kind
    shape: tuple[int, int]
    factors: tuple[Shape, Shape]
    magnitude: Shape
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    bias: bool = False
    parameter: str = "weight"
    tied_to: str | None = None
    file_path: str | None = None

    @property
    def by_weight(self) -> bool:
        """Whether a module reads this weight, instead of being called."""
        return self.kind.stack is not None

    @property
    def name(self) -> str:
        """The path of the layer, with the name of the weight where a layer has several."""
        return self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}"

    @property
    def largest_rank(self) -> int:
        """The rank that the update can have at most: the smaller side of the weight, or of each of its matrices."""
        return min(self.shape[0] // self.kind.matrices, self.shape[1])

    @property
    def scale(self) -> float:
        """The factor of the update: alpha / r, or alpha / sqrt(r)."""
        return scaling(self.alpha, self.rank, rslora=self.rslora)

    @property
    def parameters(self) -> int:
        """How many trainable numbers the adapter has here; those it shares count at the other site."""
        if self.tied_to is not None:
            return 0
        extra = (self.dora + self.bias) * self.shape[0]
        return sum(math.prod(shape) for shape in self.factors) + extra

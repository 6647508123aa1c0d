"""One layer that will get, or has, an adapter: plain data."""

from dataclasses import dataclass

from veneer.functional.lowrank import scaling
from veneer.layers.kinds import Kind


@dataclass(frozen=True)
class Site:
    """Where an adapter goes and what it looks like. `shape` is (out, in) of the layer's weight as a matrix."""

    path: str
    kind: Kind
    shape: tuple[int, int]
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float

    @property
    def scale(self) -> float:
        """The factor of the update: alpha / r, or alpha / sqrt(r)."""
        return scaling(self.alpha, self.rank, rslora=self.rslora)

    @property
    def parameters(self) -> int:
        """How many trainable numbers the adapter has here."""
        out_features, in_features = self.shape
        return self.rank * (out_features + in_features) + (out_features if self.dora else 0)

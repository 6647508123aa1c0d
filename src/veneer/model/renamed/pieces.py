"""Several adapters become one: those on matrices that lie in one parameter now.

An adapter s·BA on some rows of one matrix of the stack is, on the whole parameter, A among the rows of a larger A and
B in the rows and columns that belong to it, with zeros elsewhere. So nothing is lost, and the rank is the sum of the
ranks of the parts. Shapes: E matrices in the stack, I in, O out, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.layers.kinds.parameter import Stack
from veneer.model.renamed.former_names import Place

FACTOR_A, FACTOR_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class Piece:
    """The adapter on one matrix, as the file has it: its path there, where its weight is now, rank, alpha, scale."""

    path: str
    place: Place
    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class Joined:
    """The adapter that the pieces make together on one parameter.

    stack   the matrices that the parameter holds
    rslora  whether the scale is alpha / sqrt(R)
    """

    pieces: tuple[Piece, ...]
    stack: Stack
    rslora: bool

    @property
    def parts(self) -> int:
        """How many parts lie one below the other in each matrix."""
        return self.pieces[0].place.parts

    @property
    def widths(self) -> list[int]:
        """The rank that each part has: the largest among its matrices."""
        return [max((p.rank for p in self.pieces if p.place.part == part), default=0) for part in range(self.parts)]

    @property
    def rank(self) -> int:
        """R, the rank of the whole."""
        return sum(self.widths)

    @property
    def scale(self) -> float:
        """The scale of the first piece; the B of others takes up what differs."""
        return self.pieces[0].scale

    @property
    def alpha(self) -> float:
        """The alpha that gives a whole of this rank the scale."""
        first = self.pieces[0]
        times = self.rank / first.rank
        alpha = first.alpha * (math.sqrt(times) if self.rslora else times)
        return int(alpha) if alpha == int(alpha) else alpha

    def why_not_whole(self) -> str | None:
        """Why a new adapter on the parameter would not be what adapters on the pieces were; None if it would."""
        names = " and ".join(sorted({piece.path.rpartition(".")[2] for piece in self.pieces}))
        there = {(piece.place.matrix, piece.place.part) for piece in self.pieces}
        wanted = self.stack.matrices * self.parts if self.pieces[0].place.matrix is not None else self.parts
        if len({part for _, part in there}) < self.parts:
            return f"{names} is only {len({part for _, part in there})} of the {self.parts} parts of it"
        if len(there) < wanted:
            return f"{names} of only some of its {self.stack.matrices} matrices are named"
        if len({(piece.rank, piece.scale) for piece in self.pieces}) > 1:
            return f"rank_pattern or alpha_pattern differ among {names}"
        return None

    def problems(self, shapes: Mapping[str, tuple[int, ...]], *, dora: bool) -> list[str]:
        """What in the shapes of a file's tensors does not fit, by the names after `base_model.model.`."""
        rows, found = self._rows, []
        for piece in self.pieces:
            needed: dict[str, tuple[int, ...]] = {
                FACTOR_A: (piece.rank, self.stack.in_features),
                FACTOR_B: (rows, piece.rank),
            }
            if dora:
                needed[MAGNITUDE] = (rows,)
            for suffix, shape in needed.items():
                given = shapes.get(piece.path + suffix)
                if given != shape:
                    has = "is missing" if given is None else f"has {list(given)}"
                    found.append(f"{piece.path}{suffix} {has}, its part of {piece.place.name} needs {list(shape)}")
        if dora and (missing := self.stack.matrices * self.parts - len(self.pieces)):
            found.append(f"use_dora: {missing} matrices in {self.pieces[0].place.name} have no magnitude in the file")
        return found

    @property
    def _rows(self) -> int:
        return self.stack.out_features // self.parts

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A of shape (E·R, I), B of shape (O, R·E), and the magnitudes (E·O) if there are any, by their suffixes."""
        E, R, rows, widths = self.stack.matrices, self.rank, self._rows, self.widths
        some = tensors[self.pieces[0].path + FACTOR_A]
        A_ERI = some.new_zeros(E, R, self.stack.in_features)
        B_EOR = some.new_zeros(E, self.stack.out_features, R)
        m_EO = some.new_zeros(E, self.stack.out_features)
        for piece in self.pieces:
            e, part = piece.place.matrix or 0, piece.place.part
            first = sum(widths[:part])
            columns, own = slice(first, first + piece.rank), slice(part * rows, (part + 1) * rows)
            B = tensors[piece.path + FACTOR_B]
            A_ERI[e, columns] = tensors[piece.path + FACTOR_A].to(some.dtype)
            B_EOR[e, own, columns] = (B if piece.scale == self.scale else B * (piece.scale / self.scale)).to(some.dtype)
            if (magnitude := tensors.get(piece.path + MAGNITUDE)) is not None:
                m_EO[e, own] = magnitude.to(some.dtype)
        A, B = self.stack.joined(list(A_ERI), list(B_EOR))
        return {FACTOR_A: A, FACTOR_B: B, MAGNITUDE: m_EO.flatten()}


def whole_weight(weights: Mapping[tuple[int | None, int], Tensor]) -> Tensor:
    """A parameter from the weights that lie in it, by (matrix, part): those of a module trained in full."""
    parts = sorted({part for _, part in weights})
    if all(matrix is None for matrix, _ in weights):
        return torch.cat([weights[None, part] for part in parts])
    matrices = sorted({matrix for matrix, _ in weights if matrix is not None})
    return torch.cat([torch.stack([weights[e, part] for e in matrices]) for part in parts], dim=1)


def lacking(places: Sequence[Place], shape: Sequence[int]) -> bool:
    """Whether some of the weights that lie in a parameter of this shape are not among the places."""
    matrices = shape[0] if places[0].matrix is not None else 1
    return len({(place.matrix, place.part) for place in places}) != matrices * places[0].parts

"""EVA's ranks: many for layers whose inputs need them, few for others, the same number in all.

Paischer et al. 2024, https://arxiv.org/abs/2410.07170, section 3.2. Shapes: N rows, I in, K components.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from veneer.config.sub_configs import EvaConfig
from veneer.errors import ConfigError
from veneer.init.factors import Components
from veneer.init.incremental_pca import IncrementalPCA


class EvaComponents:
    """Components and ranks of many layers, from inputs that come in batches.

        while waiting := found.waiting():
            for name, x in inputs_of(waiting):    # rows of shape (N, I)
                found.update(name, x)
            found.end_of_batch()
        components = found.result()

    ranks       {layer: the rank it would have without EVA}; their sum is what is spread
    features    {layer: I}
    settings    rho bounds a layer's rank by rho times its own; tau says when a component is settled
    same_input  {layer: the layer whose inputs it shares}, as `shared_inputs` finds them; measured only once
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        features: Mapping[str, int],
        *,
        settings: EvaConfig | Mapping[str, object] | None = None,
        same_input: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = EvaConfig.of(settings)
        self._owner = {name: name for name in ranks if name not in (same_input or {})} | dict(same_input or {})
        self._budget = sum(ranks.values())
        most = {name: min(round(rank * self._settings.rho), features[name]) for name, rank in ranks.items()}
        groups: dict[str, list[str]] = {}
        for name, owner in self._owner.items():
            groups.setdefault(owner, []).append(name)
        self._pca = {
            owner: IncrementalPCA(max(most[name] for name in names), threshold=self._settings.tau)
            for owner, names in groups.items()
        }
        # Until every layer has components, all that a layer may get must settle.
        self.ranks = {name: self._pca[owner].components for name, owner in self._owner.items()}

    def waiting(self) -> list[str]:
        """The layers whose inputs are still needed: some component that the spread of ranks gives them moves."""
        needed: dict[str, int] = {}
        for name, owner in self._owner.items():
            needed[owner] = max(needed.get(owner, 0), self.ranks[name])
        return [name for name, pca in self._pca.items() if not pca.ready or not pca.settled[: needed[name]].all()]

    def unmeasured(self) -> dict[str, int]:
        """{layer: how many rows a batch must have} for layers that have no components yet."""
        return {name: pca.components for name, pca in self._pca.items() if not pca.ready}

    def update(self, name: str, X_NI: Tensor) -> bool:
        """Take in the inputs of one layer; False if they were passed over, being fewer rows than components.

        Raises ConfigError as `IncrementalPCA.update`.
        """
        try:
            return self._pca[name].update(X_NI)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    def end_of_batch(self) -> None:
        """Spread the ranks anew, once every layer has components."""
        if all(pca.ready for pca in self._pca.values()):
            ratios = {name: pca.ratios for name, pca in self._pca.items()}
            self.ranks = spread_ranks(ratios, self._budget, same_input=self._owner)

    def result(self) -> dict[str, Components]:
        """{layer: as many components as its new rank}; none for a layer that gets no adapter.

        Raises ConfigError while some layer is still waited for.
        """
        if waiting := self.waiting():
            raise ConfigError(
                f"EVA's components are not settled yet in {len(waiting)} of {len(self._pca)} layers "
                f"({', '.join(waiting[:3])}, …): give more batches, larger ones, or lower tau."
            )
        return {name: self._pca[owner].found(self.ranks[name]) for name, owner in self._owner.items()}


def spread_ranks(
    ratios: Mapping[str, Tensor], budget: int, *, same_input: Mapping[str, str] | None = None
) -> dict[str, int]:
    """{layer: rank}: the `budget` components that explain most, whichever layers they are of.

    ratios      {layer: the share of variance that each component explains, (K,)}
    same_input  {layer: the layer in `ratios` whose inputs it shares}; of equal components, those of layers in `ratios`
                come first

    >>> spread_ranks({"q": torch.tensor([0.9, 0.05]), "up": torch.tensor([0.5, 0.3])}, 3)
    {'q': 1, 'up': 2}
    """
    owners = {name: name for name in ratios} | dict(same_input or {})
    names = [name for name, owner in owners.items() for _ in range(len(ratios[owner]))]
    values = torch.cat([ratios[owner].cpu().double() for owner in owners.values()])
    order = values.argsort(descending=True, stable=True)
    counts = Counter(names[i] for i in order[:budget].tolist())
    return {name: counts[name] for name in owners}


def alpha_for(alpha: float, rank: int, new_rank: int, *, settings: EvaConfig) -> float:
    """The alpha of a layer whose rank changes: alpha / r stays, if the settings say so."""
    return alpha * new_rank / rank if settings.adjust_scaling_factors and new_rank != rank else alpha


def shared_inputs(fingerprints: Mapping[str, Hashable]) -> dict[str, str]:
    """{layer: the first layer with the same fingerprint}, for layers that are not the first."""
    first: dict[Hashable, str] = {}
    owners = {name: first.setdefault(mark, name) for name, mark in fingerprints.items()}
    return {name: owner for name, owner in owners.items() if owner != name}


def fingerprint(X: Tensor) -> Hashable:
    """Equal for tensors of equal shape, dtype and bytes."""
    data = X.detach().contiguous().cpu().flatten().view(torch.uint8)
    return tuple(X.shape), str(X.dtype), hashlib.sha256(data.numpy().tobytes()).digest()

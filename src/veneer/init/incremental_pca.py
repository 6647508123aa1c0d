"""Principal components of inputs that come in batches, for EVA. Shapes: N rows, I in, K components.

Ross et al. 2008, "Incremental learning for robust visual tracking", section 3.
"""

import torch
from torch import Generator, Tensor

from veneer.errors import ConfigError
from veneer.functional.svd import randomized_svd, signs_fixed
from veneer.init.factors import Components

_NITER = 4
_SEED = 42  # of the random projections: the same data give the same components


class IncrementalPCA:
    """The leading components of all rows seen so far, centred, without keeping the rows. In float64.

    components  K, how many; at most the number of features
    threshold   a component counts as settled while its cosine similarity to the step before is at least this
    """

    def __init__(self, components: int, *, threshold: float = 0.99) -> None:
        self.components = components
        self.threshold = threshold
        self.rows = 0
        self.settled = torch.zeros(components, dtype=torch.bool)
        self._mean_I = self._vectors_KI = self._S_K = torch.empty(0)
        self._spread = torch.zeros((), dtype=torch.float64)  # squared distances from the mean, all features together

    @property
    def ready(self) -> bool:
        """Whether there are components to ask for: one batch with enough rows came."""
        return self.rows > 0

    @property
    def ratios(self) -> Tensor:
        """The share of all variance that each component explains, of shape (K,)."""
        return self._S_K**2 / self._spread if self._spread > 0 else torch.zeros_like(self._S_K)

    def found(self, count: int | None = None) -> Components:
        """The `count` leading components, all if None, in float32."""
        return Components(self._vectors_KI[:count].float(), self._S_K[:count].float())

    @torch.no_grad()
    def update(self, X_NI: Tensor) -> bool:
        """Take in one batch; False if it has fewer rows than components, so that nothing could be done with it.

        Raises ConfigError if there are more components than features, if the features are not those of the batch
        before, or if a value is not finite.
        """
        self._check(X_NI)
        count = len(X_NI)
        if count < self.components:
            return False
        X_NI = X_NI.double()
        mean_I = X_NI.mean(0)
        rows, before = X_NI - mean_I, self._vectors_KI
        self._spread = self._spread.to(X_NI.device) + rows.square().sum()
        total = self.rows + count
        if self.ready:
            # The rows so far are summed up by their components; a shift of the mean counts as one row more.
            shift_I = (self.rows * count / total) ** 0.5 * (self._mean_I - mean_I)
            self._spread += shift_I.square().sum()
            rows = torch.cat([self._S_K[:, None] * before, rows, shift_I[None]])
            self._mean_I = (self.rows * self._mean_I + count * mean_I) / total
        else:
            self._mean_I = mean_I
        generator = Generator().manual_seed(_SEED)
        _, S, Vh = randomized_svd(rows, min(2 * self.components, *rows.shape), niter=_NITER, generator=generator)
        self._S_K, self._vectors_KI = S[: self.components], signs_fixed(Vh[: self.components])
        if self.ready:
            self.settled = ((self._vectors_KI * before).sum(1) >= self.threshold).cpu()
        self.rows = total
        return True

    def _check(self, X_NI: Tensor) -> None:
        features = X_NI.shape[-1]
        if X_NI.ndim != 2 or not X_NI.is_floating_point():
            raise ConfigError(f"Inputs must be real rows of shape (N, I), not {tuple(X_NI.shape)} of {X_NI.dtype}.")
        if self.components > features:
            raise ConfigError(f"There are no {self.components} components of {features} features: ask for fewer.")
        if self.ready and features != len(self._mean_I):
            raise ConfigError(f"These rows have {features} features, those before had {len(self._mean_I)}.")
        if not torch.isfinite(X_NI).all():
            raise ConfigError("Some inputs are NaN or infinity. Check the data, and the model's dtype.")

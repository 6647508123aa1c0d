"""EVA: A starts as the principal components of the layer's inputs. Shapes: I in, O out, R rank, K components.

Paischer et al. 2024, https://arxiv.org/abs/2410.07170. The components come from `incremental_pca.py`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Generator

from veneer.config.sub_configs import EvaConfig
from veneer.errors import ConfigError
from veneer.init.checks import finite, most, shaped
from veneer.init.factors import Components, Factors, Weight


def eva(
    weight: Weight,
    rank: int,
    *,
    scale: float = 1.0,
    options: EvaConfig | Mapping[str, Any] | None = None,
    stats: Components | None = None,
    generator: Generator | None = None,
) -> Factors:
    """A the R leading components, B zero. With `whiten`, each is divided by the square root of its singular value.

    Raises ConfigError if there are fewer components than the rank, or if they do not fit the layer.
    """
    if stats is None:
        raise ConfigError("'eva' starts from the inputs of each layer: measure them first and give them as `stats`.")
    settings = EvaConfig.of(options)
    found = len(stats.vectors)
    most(rank, found, f"only {found} components were measured", "eva")
    shaped(stats.vectors, (found, weight.in_features), "components", "eva")
    A_RI = finite(stats.vectors, "the components of its inputs", "eva")[:rank].to(weight.device)
    if settings.whiten:
        if stats.singular_values is None:
            raise ConfigError("'eva' with whiten=True needs the singular values too: they go with the components.")
        shaped(stats.singular_values, (found,), "singular values", "eva")
        S_R = finite(stats.singular_values, "the singular values", "eva")[:rank].to(weight.device)
        if not (S_R > 0).all():
            raise ConfigError("'eva' cannot whiten: some component has no variance. Lower r, or use whiten=False.")
        A_RI = A_RI / S_R.sqrt()[:, None]
    return Factors(A_RI, A_RI.new_zeros(weight.out_features, rank))

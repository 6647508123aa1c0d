import pytest
import torch

from veneer.errors import ConfigError
from veneer.init.mean_gradient import MeanGradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_in_float32(dtype):
    mean, gradients = MeanGradient(3, 4), [torch.randn(3, 4).to(dtype) for _ in range(5)]
    for gradient in gradients:
        mean.update(gradient)
    torch.testing.assert_close(mean.mean(), torch.stack(gradients).float().mean(0))


def test_gradients_that_cannot_be_used():
    mean = MeanGradient(3, 4)
    with pytest.raises(ConfigError, match="does not depend on this layer"):
        mean.mean()
    with pytest.raises(ConfigError, match=r"\(4, 3\), not \(3, 4\)"):
        mean.update(torch.ones(4, 3))
    with pytest.raises(ConfigError, match="NaN"):
        mean.update(torch.full((3, 4), float("nan")))

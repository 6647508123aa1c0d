import pytest
import torch

from veneer.errors import ConfigError
from veneer.init.covariance import Covariance


def samples(count=4, tokens=30, features=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, features, generator=generator) for _ in range(count)]


def expected(data):
    rows = [x.double() / x.double().max().abs() for x in data]
    return sum(x.T @ x for x in rows) / len(rows)


def measured(data, **fields):
    covariance = Covariance(6, **fields)
    for x in data:
        covariance.update(x)
    return covariance.mean()


def test_the_mean_over_samples_each_divided_by_its_largest_input():
    torch.testing.assert_close(measured(samples()).double(), expected(samples()), rtol=1e-5, atol=1e-5)


def test_a_sample_may_have_a_batch_dimension():
    data = samples()
    assert torch.equal(measured([x[None] for x in data]), measured(data))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_multiplied_in_float32(dtype):
    data = [x.to(dtype) for x in samples()]
    torch.testing.assert_close(measured(data).double(), expected(data), rtol=1e-5, atol=1e-5)


def test_half_precision_memory_does_not_overflow():
    """A sum over these samples would leave float16's range."""
    data = [torch.ones(2000, 6)] * 60
    mean = measured(data, float16=True)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.full((6, 6), 2000.0), rtol=1e-2, atol=0)


def test_inputs_without_a_positive_value():
    assert torch.equal(measured([torch.zeros(5, 6)]), torch.zeros(6, 6))
    relu = -torch.rand(5, 6)
    relu[0, 0] = 0
    torch.testing.assert_close(measured([relu]), (relu / relu.abs().max()).T @ (relu / relu.abs().max()))


def test_inputs_that_cannot_be_used():
    covariance = Covariance(6)
    for X, match in [
        (torch.randn(3, 5), "5 features, 6 were expected"),
        (torch.full((3, 6), float("inf")), "infinity"),
        (torch.empty(0, 6), "no inputs at all"),
    ]:
        with pytest.raises(ConfigError, match=match):
            covariance.update(X)
    with pytest.raises(ConfigError, match="never reached"):
        covariance.mean()

"""Streaming components against PEFT's, and against one decomposition of all rows in float64."""

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA as Theirs

from veneer.errors import ConfigError
from veneer.init.incremental_pca import IncrementalPCA

FEATURES = 20


def batches(count=6, rows=50, *, seed=0, shift=0.3):
    """Rows of one distribution with a clear spectrum, whose mean moves from batch to batch."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator)).Q
    scales = 0.75 ** torch.arange(FEATURES)
    return [(torch.randn(rows, FEATURES, generator=generator) * scales) @ basis.T + 1 + shift * i for i in range(count)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("components", [1, 4, 8])
def test_every_step_is_peft_s(components, seed):
    ours = IncrementalPCA(components, threshold=0.99)
    theirs = Theirs(n_components=components, copy=True, lowrank=True, lowrank_seed=42)
    before = None
    tolerance = 1e-2 if components == 1 else 1e-3  # two random projections for one component are few
    for batch in batches(seed=seed):
        assert ours.update(batch)
        theirs.partial_fit(batch)
        found = ours.found()
        torch.testing.assert_close(found.vectors, theirs.components_.float(), rtol=0, atol=tolerance)
        torch.testing.assert_close(found.singular_values, theirs.singular_values_.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.ratios, theirs.explained_variance_ratio_.double(), rtol=1e-3, atol=1e-4)
        if before is not None:
            similarity = torch.nn.functional.cosine_similarity(theirs.components_, before)
            assert torch.equal(ours.settled, similarity >= 0.99)
        before = theirs.components_.clone()


def test_all_components_are_exact():
    data = batches()
    ours = IncrementalPCA(FEATURES)
    for batch in data:
        ours.update(batch)
    rows = torch.cat(data).double()
    _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = ours.found()
    torch.testing.assert_close(found.singular_values.double(), S, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        (found.vectors * Vh).sum(1).abs(), torch.ones_like(S), rtol=0, atol=1e-5, check_dtype=False
    )
    torch.testing.assert_close(ours.ratios, S**2 / (S**2).sum())
    assert ours.rows == len(rows)


def test_a_distribution_that_stays_settles():
    ours = IncrementalPCA(3)
    for batch in batches(30, shift=0):
        ours.update(batch)
    assert ours.settled.all()
    ours.update(100 * torch.randn(50, FEATURES))
    assert not ours.settled.all()


def test_vectors_are_orthonormal_and_signs_fixed():
    ours = IncrementalPCA(5)
    for batch in batches():
        ours.update(batch)
    V = ours.found().vectors
    torch.testing.assert_close(V @ V.T, torch.eye(5), rtol=0, atol=1e-5)
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()
    assert ours.found(2).vectors.shape == (2, FEATURES)
    assert ours.found(2).singular_values.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_real_dtype_will_do_and_inputs_stay_as_they_are(dtype):
    ours, X = IncrementalPCA(3), batches()[0].to(dtype)
    before = X.clone()
    ours.update(X)
    assert torch.equal(X, before)
    assert ours.found().vectors.dtype == torch.float32


def test_a_batch_with_too_few_rows_is_passed_over():
    ours = IncrementalPCA(8)
    assert not ours.update(torch.randn(7, FEATURES))
    assert not ours.ready
    assert ours.update(torch.randn(8, FEATURES))
    assert ours.ready
    assert not ours.update(torch.randn(0, FEATURES))


def test_rows_that_are_all_alike_explain_nothing():
    ours = IncrementalPCA(2)
    ours.update(torch.zeros(10, FEATURES))
    assert torch.equal(ours.ratios, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("X", "match"),
    [
        (torch.randn(9, FEATURES, 2), "real rows"),
        (torch.ones(9, FEATURES, dtype=torch.int64), "real rows"),
        (torch.randn(9, 3), "no 4 components of 3 features"),
        (torch.randn(9, FEATURES + 1), "21 features, those before had 20"),
        (torch.full((9, FEATURES), float("nan")), "NaN"),
    ],
)
def test_inputs_that_cannot_be_used(X, match):
    ours = IncrementalPCA(4)
    ours.update(batches()[0])
    with pytest.raises(ConfigError, match=match):
        ours.update(X)
    assert ours.rows == 50

"""The eleven combinations against PEFT's own add_weighted_adapter, the formulas in float64, and each other."""

import copy
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from veneer.errors import ConfigError, MergeError
from veneer.functional.combine import COMBINATIONS, Combination, Update, combine, combined_rank

WEIGHTS = [0.7, -0.4, 1.3]
NAMES = ["one", "two", "three"]
FACTORS = [name for name, method in COMBINATIONS.items() if method.on == "factors"]
PRUNING = [name for name, method in COMBINATIONS.items() if method.prunes]
LAYERS = {
    "linear": lambda: nn.Linear(10, 7),
    "conv2d": lambda: nn.Conv2d(4, 7, 3),
    "conv1x1": lambda: nn.Conv2d(9, 7, 1),
    "embedding": lambda: nn.Embedding(12, 7),
}


def options(name: str, **changes) -> Combination:
    density = 0.6 if COMBINATIONS[name].prunes else None
    return Combination(**{"combination_type": name, "density": density, **changes})


def random_update(*, rank=3, shape=(7, 10), scale=0.5, seed=0, dtype=torch.float64) -> Update:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, *shape[1:], generator=generator, dtype=torch.float64).to(dtype)
    B = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator, dtype=torch.float64).to(dtype)
    return Update(A, B, scale)


def updates(ranks=(3, 3, 3), **kwargs) -> list[Update]:
    return [random_update(rank=rank, seed=i, scale=(0.5, 2.0, 1.5)[i], **kwargs) for i, rank in enumerate(ranks)]


def weighted_sum(given_updates, weights) -> torch.Tensor:
    return sum(w * u.scale * (u.B.flatten(1) @ u.A.flatten(1)) for u, w in zip(given_updates, weights, strict=True))


def oracle(kind: str, ranks: list[int], **fields):
    """A PEFT model of one layer with one random adapter a rank, and the same adapters as updates."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]())
    for name, rank in zip(NAMES, ranks, strict=False):
        config = peft.LoraConfig(target_modules=["0"], r=rank, lora_alpha=2 + rank, **fields)
        if name == NAMES[0]:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model, layer, [of_peft(layer, name) for name in NAMES[: len(ranks)]]


def of_peft(layer, name: str) -> Update:
    if name in layer.lora_A:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    else:
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return Update(A.detach().clone(), B.detach().clone(), layer.scaling[name])


def by_peft(model, layer, names, weights, chosen: Combination) -> Update:
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, "new", **vars(chosen))
    return of_peft(model.base_model.model[0], "new")


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if not name.startswith("dare")])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("count", [2, 3])
def test_equals_peft(name, kind, count):
    model, layer, given_updates = oracle(kind, [4] * count)
    theirs = by_peft(model, layer, NAMES[:count], WEIGHTS[:count], options(name))
    ours = combine(given_updates, WEIGHTS[:count], options(name))
    assert (ours.A.shape, ours.B.shape, ours.scale) == (theirs.A.shape, theirs.B.shape, theirs.scale)
    torch.testing.assert_close(ours.delta(), theirs.delta(), rtol=1e-5, atol=5e-5)
    if name in FACTORS or name == "cat":
        torch.testing.assert_close(ours.A, theirs.A)
        torch.testing.assert_close(ours.B, theirs.B)


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name.startswith("dare")])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1x1"])
def test_random_pruning_equals_peft_from_the_same_seed(monkeypatch, name, kind):
    model, layer, given_updates = oracle(kind, [4, 4, 4])
    # the last thing PEFT does before it combines, and after its new adapter has drawn its random start
    monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(5))
    theirs = by_peft(model, layer, NAMES, WEIGHTS, options(name))
    torch.manual_seed(5)
    ours_global = combine(given_updates, WEIGHTS, options(name))
    ours = combine(given_updates, WEIGHTS, options(name), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours.delta(), ours_global.delta(), rtol=0, atol=0)
    torch.testing.assert_close(ours.delta(), theirs.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_frequency_votes_equal_peft(monkeypatch, name):
    model, layer, given_updates = oracle("linear", [4, 4, 4])
    monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(5))
    chosen = options(name, majority_sign_method="frequency")
    theirs = by_peft(model, layer, NAMES, WEIGHTS, chosen)
    ours = combine(given_updates, WEIGHTS, chosen, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours.delta(), theirs.delta(), rtol=1e-5, atol=1e-5)
    by_total = combine(given_updates, WEIGHTS, options(name), generator=torch.Generator().manual_seed(5))
    assert not torch.allclose(ours.delta(), by_total.delta())


@pytest.mark.parametrize("changes", [{"svd_rank": 2}, {"svd_rank": 6}, {"svd_rank": 5, "svd_clamp": 0.9}])
@pytest.mark.parametrize("name", ["svd", "ties_svd"])
@pytest.mark.parametrize("full", [True, False])
def test_svd_options_equal_peft(name, changes, full):
    model, layer, given_updates = oracle("linear", [3, 4, 2])
    chosen = options(name, svd_full_matrices=full, **changes)
    theirs = by_peft(model, layer, NAMES, WEIGHTS, chosen)
    ours = combine(given_updates, WEIGHTS, chosen)
    assert ours.rank == changes["svd_rank"]
    torch.testing.assert_close(ours.delta(), theirs.delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cat", "svd"])
def test_ranks_may_differ_and_rslora_counts_once(name):
    """PEFT's new adapter keeps use_rslora with alpha = r, and so comes out sqrt(r) too strong."""
    model, layer, given_updates = oracle("linear", [4, 2, 3], use_rslora=True)
    expected = weighted_sum(given_updates, WEIGHTS)
    changes = {} if name == "cat" else {"svd_rank": 9}
    ours = combine(given_updates, WEIGHTS, options(name, **changes))
    assert ours.rank == 9
    torch.testing.assert_close(ours.delta(), expected, rtol=1e-5, atol=1e-5)
    if name == "cat":
        theirs = by_peft(model, layer, NAMES, WEIGHTS, options(name))
        torch.testing.assert_close(theirs.delta(), 3 * expected, rtol=1e-5, atol=1e-5)


def test_ties_by_hand():
    """Four values of three adapters; the two largest of each are kept, signs elected before weights count."""
    rows = torch.tensor([[5.0, -2, 3, 1], [4, 3, -1, -2], [-1, -5, 2, 6]], dtype=torch.float64)
    given_updates = [Update(row[None], torch.ones(1, 1, dtype=torch.float64), 1.0) for row in rows]
    # kept:  5 . 3 .  |  4 3 . .  |  . -5 . 6        sums: 9, -2, 3, 6
    weights = [1.0, 2.0, 4.0]
    expected = torch.tensor([[(5 * 1 + 4 * 2) / 2, -5 * 4 / 1, 3 * 1 / 1, 6 * 4 / 1]], dtype=torch.float64)
    mixed = combine(given_updates, weights, options("ties_svd", density=0.5)).delta()
    torch.testing.assert_close(mixed, expected)
    # by heads: one plus and one minus in the second column is a draw, and a draw is plus
    expected[0, 1] = 3 * 2
    mixed = combine(given_updates, weights, options("ties_svd", density=0.5, majority_sign_method="frequency")).delta()
    torch.testing.assert_close(mixed, expected)


def test_linear_by_hand():
    a, b = updates((3, 3))
    result = combine([a, b], [0.5, -2.0], options("linear"))
    torch.testing.assert_close(result.A, 0.25**0.5 * a.A - 4.0**0.5 * b.A)
    torch.testing.assert_close(result.B, 0.25**0.5 * a.B + 4.0**0.5 * b.B)


@pytest.mark.parametrize("weight", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_one_adapter_alone_is_its_own_multiple(name, weight):
    alone = random_update()
    chosen = options(name, **({"density": 1.0} if name in PRUNING else {}))
    torch.testing.assert_close(combine([alone], [weight], chosen).delta(), weight * alone.delta())


@pytest.mark.parametrize("name", PRUNING)
def test_one_adapter_alone_is_pruned_as_asked(name):
    """PEFT turns every combination of one adapter into `linear`, and the density does nothing."""
    pruned = combine([random_update()], [1.0], options(name, density=0.2), generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(pruned.delta(), random_update().delta())


def test_half_the_largest_values_are_kept():
    alone = random_update(scale=1.0)
    pruned = combine([alone], [1.0], options("magnitude_prune", density=0.5))
    for before, after in ((alone.A, pruned.A), (alone.B, pruned.B)):
        least = before.abs().flatten().sort(descending=True).values[int(before.numel() * 0.5) - 1]
        torch.testing.assert_close(after, torch.where(before.abs() >= least, before, 0.0))


def test_random_pruning_keeps_the_mean_and_the_share():
    ones = Update(torch.ones(1, 400, dtype=torch.float64), torch.ones(300, 1, dtype=torch.float64), 1.0)
    chosen = options("dare_linear_svd", density=0.3, svd_rank=300)
    delta = combine([ones], [1.0], chosen, generator=torch.Generator().manual_seed(1)).delta()
    assert (delta.abs() > 1e-6).double().mean() == pytest.approx(0.3, abs=0.005)
    assert delta.mean() == pytest.approx(1.0, abs=0.02)
    assert delta.max() == pytest.approx(1 / 0.3)


@pytest.mark.parametrize("name", ["dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"])
def test_randomness_comes_from_the_generator_alone(name):
    state = torch.get_rng_state()
    first, again, other = (
        combine(updates(), WEIGHTS, options(name), generator=torch.Generator().manual_seed(seed)).delta()
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(state, torch.get_rng_state())


SMALL = st.integers(1, 5)
NUMBERS = st.floats(-4, 4, allow_subnormal=False)


@st.composite
def layers(draw, *, equal_ranks: bool = False):
    count, out, features, groups = draw(st.integers(1, 4)), draw(SMALL), draw(SMALL), draw(st.integers(1, 2))
    kernel = draw(st.sampled_from([(), (2,), (3, 1)])) if groups == 1 else (2, 2)
    ranks = [draw(SMALL)] * count if equal_ranks else [draw(SMALL) for _ in range(count)]
    seed = draw(st.integers(0, 2**31))
    made = []
    for place, rank in enumerate(ranks):
        u = random_update(rank=groups * rank, shape=(groups * out, features, *kernel), seed=seed + place)
        made.append(Update(u.A, u.B[:, :rank].contiguous(), draw(NUMBERS)))
    return made, [draw(NUMBERS) for _ in range(count)], groups


def grouped_delta(update: Update, groups: int) -> torch.Tensor:
    """The update as a matrix, from what a grouped convolution of kernel 1 makes of B and each column of A."""
    A = update.A.flatten(1)
    columns = nn.functional.conv1d(A[None], update.B.flatten(1)[:, :, None], groups=groups)[0]
    return update.scale * columns


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(layers())
def test_cat_and_a_full_svd_are_the_weighted_sum(layer):
    given_updates, weights, groups = layer
    expected = sum(w * grouped_delta(u, groups) for u, w in zip(given_updates, weights, strict=True))
    rank = sum(update.rank for update in given_updates)
    assert [update.groups for update in given_updates] == [groups] * len(given_updates)
    for chosen in (Combination(combination_type="cat"), Combination(svd_rank=rank)):
        result = combine(given_updates, weights, chosen)
        assert result.rank == rank == combined_rank(chosen, [update.rank for update in given_updates])
        assert result.A.shape[1:] == given_updates[0].A.shape[1:]
        assert result.B.shape[2:] == given_updates[0].B.shape[2:]
        torch.testing.assert_close(grouped_delta(result, groups), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(layers(), st.integers(1, 6))
def test_svd_leaves_out_the_smallest_singular_values_and_no_more(layer, rank):
    given_updates, weights, groups = layer
    result = combine(given_updates, weights, Combination(svd_rank=rank * groups))
    expected = sum(w * u.delta() for u, w in zip(given_updates, weights, strict=True))
    left_out = sum(torch.linalg.svdvals(part)[rank:].square().sum() for part in expected.chunk(groups))
    error = (result.delta() - expected).square().sum()
    torch.testing.assert_close(error, torch.as_tensor(left_out, dtype=error.dtype), rtol=1e-7, atol=1e-9)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(layers(equal_ranks=True), st.sampled_from(["svd", "linear", "cat", "magnitude_prune", "magnitude_prune_svd"]))
def test_the_order_of_adapters_does_not_count(layer, name):
    given_updates, weights, _ = layer
    chosen = options(name, **({"density": 1.0} if name in PRUNING else {}))
    forth = combine(given_updates, weights, chosen)
    back = combine(given_updates[::-1], weights[::-1], chosen)
    torch.testing.assert_close(forth.delta(), back.delta(), rtol=1e-6, atol=1e-6)
    assert forth.rank == back.rank


def ties_value(values: list[float], weights: list[float], by_heads: bool) -> float:
    """One value of TIES, by the paper, with PEFT's weights."""
    votes = sum((v > 0) - (v < 0) if by_heads else v for v in values)
    agreeing = [v * w for v, w in zip(values, weights, strict=True) if (v > 0 if votes >= 0 else v < 0)]
    return sum(agreeing) / len(agreeing) if agreeing else 0.0


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.data())
def test_ties_is_the_formula_value_by_value(data):
    """Whole numbers, so that sums are exact and a draw is a draw; one row, so that the update is A."""
    count, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    whole = st.integers(-3, 3)
    rows = data.draw(st.lists(st.lists(whole, min_size=width, max_size=width), min_size=count, max_size=count))
    weights = data.draw(st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=count, max_size=count))
    vote = data.draw(st.sampled_from(["total", "frequency"]))
    one = torch.ones(1, 1, dtype=torch.float64)
    given_updates = [Update(torch.tensor([row], dtype=torch.float64), one) for row in rows]
    expected = [ties_value(list(column), weights, vote == "frequency") for column in zip(*rows, strict=True)]
    result = combine(given_updates, weights, options("ties_svd", density=1.0, majority_sign_method=vote))
    torch.testing.assert_close(result.delta()[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_half_precision_is_rounded_once(name, dtype):
    """PEFT's svd fails in half precision, and its cat rounds the weight and the scale apart."""
    narrow = updates(dtype=dtype)
    chosen, seed = options(name, **({"density": 1.0} if name in PRUNING else {})), torch.Generator()
    result = combine(narrow, WEIGHTS, chosen, generator=seed)
    exact = combine([u.to(torch.float64) for u in narrow], WEIGHTS, chosen, generator=seed)
    assert (result.A.dtype, result.B.dtype) == (dtype, dtype)
    tolerance = 8 * torch.finfo(dtype).eps
    error = (result.to(torch.float64).delta() - exact.delta()).norm() / exact.delta().norm()
    assert error < tolerance
    if COMBINATIONS[name].on != "deltas":
        torch.testing.assert_close(result.A.double(), exact.A, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_adapters_of_two_dtypes_meet_in_the_one_that_holds_both():
    half, full = updates((3, 3))
    result = combine([half.to(torch.float16), full.to(torch.float32)], [1.0, 1.0], options("cat"))
    assert (result.A.dtype, result.B.dtype) == (torch.float32, torch.float32)


def test_what_does_not_fit_into_half_precision_is_refused():
    large = Update(torch.full((2, 3), 3e4, dtype=torch.float16), torch.ones(2, 2, dtype=torch.float16), 4.0)
    with pytest.raises(MergeError, match="torch.float16: convert the adapters to float32"):
        combine([large], [1.0], options("cat"))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_result_owns_its_memory_and_the_adapters_stay(name):
    given_updates = [Update(nn.Parameter(u.A), nn.Parameter(u.B), u.scale) for u in updates()]
    before = copy.deepcopy(given_updates)
    result = combine(given_updates, WEIGHTS, options(name, **({"density": 1.0} if name in PRUNING else {})))
    for t in (result.A, result.B):
        assert not t.requires_grad
        assert t.is_contiguous()
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
        t.fill_(7.0)
    for old, new in zip(before, given_updates, strict=True):
        assert torch.equal(old.A, new.A)
        assert torch.equal(old.B, new.B)


def test_a_rank_above_the_possible_one_is_filled_with_zeros():
    given_updates = updates((2, 2), shape=(3, 10))
    result = combine(given_updates, [1.0, 1.0], options("svd", svd_rank=8))
    assert (result.A.shape, result.B.shape) == ((8, 10), (3, 8))
    torch.testing.assert_close(result.delta(), weighted_sum(given_updates, [1.0, 1.0]))


def test_svd_of_a_vocabulary_never_makes_the_whole_update():
    """Which would be 80 GB here, and PEFT's full matrices twice that."""
    given_updates = updates((2, 2), shape=(100_000, 200_000), dtype=torch.float32)
    result = combine(given_updates, [1.0, -1.0], Combination(svd_rank=4))
    x = random_update(rank=1, shape=(1, 200_000), dtype=torch.float32).A[0]
    expected = sum(w * u.scale * u.B @ (u.A @ x) for u, w in zip(given_updates, [1.0, -1.0], strict=True))
    assert (result.B @ (result.A @ x) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("name", "ranks", "expected"), [("linear", [4, 4], 4), ("cat", [4, 2], 6), ("svd", [4, 2], 4), ("ties_svd", [1], 1)]
)
def test_rank_of_the_combination(name, ranks, expected):
    assert combined_rank(options(name), ranks) == expected


def refusal(chosen: Combination, given_updates=None, weights=None, names=None) -> str:
    given_updates = updates() if given_updates is None else given_updates
    weights = [1.0] * len(given_updates) if weights is None else weights
    with pytest.raises(ConfigError) as caught:
        combine(given_updates, weights, chosen, names=names)
    return str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Combination(combination_type="tise"), "did you mean 'ties'?"),
        (Combination(combination_type=None), "combination_type: None is none of svd, linear, cat"),
        (Combination(combination_type="ties"), "density: ties needs it"),
        (Combination(combination_type="ties", density=0.0), "density: 0.0 must be"),
        (Combination(combination_type="ties", density=1.5), "density: 1.5 must be"),
        (Combination(combination_type="ties", density=float("nan")), "density: nan must be"),
        (Combination(combination_type="ties", density=True), "density: True must be"),
        (Combination(combination_type="ties", density=0.01), "keeps none of the 30 values of A"),
        (Combination(combination_type="ties_svd", density=0.01), "keeps none of the 70 values of B A"),
        (Combination(combination_type="cat", density=0.5), "density: cat prunes nothing"),
        (Combination(svd_rank=0), "svd_rank: 0 must be"),
        (Combination(svd_rank=2.0), "svd_rank: 2.0 must be"),
        (Combination(svd_rank=True), "svd_rank: True must be"),
        (Combination(svd_clamp=0), "svd_clamp: 0 must be"),
        (Combination(svd_clamp=0.001), "cutting at it would leave nothing"),
        (Combination(svd_clamp="0.9"), "svd_clamp: '0.9' must be"),
        (Combination(svd_full_matrices=1), "svd_full_matrices: 1 must be"),
        (Combination(svd_driver="gesv"), "svd_driver: 'gesv' must be"),
        (Combination(svd_driver="gesvd"), "svd_driver: it works on CUDA only"),
        (Combination(majority_sign_method="totl"), "did you mean 'total'?"),
        (Combination(majority_sign_method="frequency"), "majority_sign_method: svd elects no signs"),
    ],
)
def test_options_that_cannot_be_meant(chosen, expected):
    assert expected in refusal(chosen)


def test_every_problem_is_told_at_once():
    chosen = Combination(
        combination_type="linear",
        svd_rank=4,
        svd_clamp=0.9,
        svd_driver="gesvd",
        svd_full_matrices=False,
        density=0.5,
        majority_sign_method="frequency",
    )
    message = refusal(chosen, weights=[1.0, float("inf")], names=["chat", "code", "law"])
    assert message.startswith("Adapters chat, code, law cannot be combined:")
    fields = ("svd_rank", "svd_clamp", "svd_driver", "svd_full_matrices", "density", "majority_sign_method")
    for field in fields:
        assert f"\n  {field}: linear" in message
    assert "weights: 2 for 3 adapters (chat, code, law); give each adapter one" in message
    assert "weights: inf for adapter code is not a finite number" in message


@pytest.mark.parametrize("name", FACTORS)
def test_unequal_ranks_are_named(name):
    message = refusal(options(name), updates((3, 4, 3)), names=["chat", "code", "law"])
    assert f"{name} needs adapters of one rank, but chat has 3, code has 4, law has 3; svd and cat take any" in message


def changed(**parts) -> list[Update]:
    return [random_update(), random_update(seed=1)._replace(**parts)]


@pytest.mark.parametrize(
    ("given_updates", "expected"),
    [
        ([], "adapters: none are given"),
        (changed(A=torch.ones(3, 11)), "adapter 2 has an update of shape 7x11, 1 one of 7x10"),
        (changed(A=torch.ones(4, 10)), "adapter 2: A of shape (4, 10) and B of shape (7, 3) do not multiply"),
        (changed(A=torch.ones(6, 10)), "adapter 2 has an update of shape 7x10 in 2 groups, 1 one of 7x10"),
        (changed(B=torch.ones(7, 3, 2)), "do not multiply"),
        (changed(A=torch.ones(3)), "do not multiply"),
        (changed(A=torch.ones(3, 10, device="meta")), "adapter 2 is on"),
        (changed(A=torch.full((3, 10), float("nan"))), "adapter 2: A has values that are not finite"),
        (changed(B=torch.ones(7, 3, dtype=torch.int8)), "adapter 2: B has torch.int8 values"),
        (changed(scale=float("inf")), "adapter 2: its scale is inf"),
    ],
)
def test_layers_that_cannot_be_combined(given_updates, expected):
    assert expected in refusal(Combination(), given_updates)


def test_a_rank_must_divide_among_the_groups_of_a_convolution():
    u = random_update(rank=4, shape=(6, 5, 3))
    grouped = Update(u.A, u.B[:, :2].contiguous(), 1.0)
    assert "svd_rank: 3 does not divide among the 2 groups" in refusal(Combination(svd_rank=3), [grouped])

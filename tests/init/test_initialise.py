"""What `initialise` promises of every method, and what it refuses."""

import dataclasses

import pytest
import torch

from init.oracle import matrix
from veneer.config.sub_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from veneer.errors import ConfigError
from veneer.init import INITS, Components, Weight, initialise

OUT, IN, RANK = 12, 20, 4
READS = ("pissa", "pissa_niter_2", "olora", "loftq", "mica", "corda")
SUBTRACTS = ("pissa", "pissa_niter_2", "olora", "corda", "lora_ga")
NAMES = (*INITS, "pissa_niter_2")
RANDOM = ("kaiming", "kaiming_both", "gaussian", "embedding_default", "normal_both", "orthogonal", "pissa_niter_2")


def stats_for(name, out=OUT, into=IN):
    X = matrix(50, into, seed=2)
    match name:
        case "eva":
            _, S, Vh = torch.linalg.svd(X, full_matrices=False)
            return Components(Vh, S)
        case "corda":
            return X.T @ X
        case "lora_ga":
            return matrix(out, into, seed=3)
    return None


def made(name, *, W=None, rank=RANK, **fields):
    W = matrix(OUT, IN) if W is None else W
    return initialise(name, Weight.of(W), rank, **{"stats": stats_for(name, *W.shape), **fields})


def seed(number):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes_dtype_and_memory_of_their_own(name, dtype):
    W = matrix(OUT, IN).to(dtype)
    before = W.clone()
    factors = made(name, W=torch.nn.Parameter(W))
    assert (factors.A.shape, factors.B.shape) == ((RANK, IN), (OUT, RANK))
    for X in (factors.A, factors.B):
        assert X.dtype == torch.float32
        assert X.is_contiguous()
        assert not X.requires_grad
        assert X.untyped_storage().nbytes() == X.nbytes
    assert torch.equal(W, before)


@pytest.mark.parametrize("name", NAMES)
def test_flags(name):
    factors = made(name)
    assert factors.subtract == (name in SUBTRACTS)
    assert factors.frozen == (("B",) if name == "mica" else ())
    assert (factors.base is not None) == (name == "loftq")


@pytest.mark.parametrize("name", NAMES)
def test_a_generator_decides_every_number_and_leaves_torch_s_own_alone(name):
    before = torch.get_rng_state()
    one, same = made(name, generator=seed(1)), made(name, generator=seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.A, same.A)
    assert torch.equal(one.B, same.B)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RANDOM) - {"lora_ga"}))
def test_nothing_is_random_in_the_other_methods(name):
    generator = seed(1)
    before = generator.get_state()
    made(name, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_a_name_that_is_none_is_refused_with_the_one_meant():
    with pytest.raises(ConfigError, match="did you mean 'pissa'"):
        initialise("pisa", Weight.of(matrix(4, 4)), 2)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "olora", "loftq", "mica", "corda", "lora_ga", "eva"])
def test_a_rank_that_the_layer_cannot_have(name):
    with pytest.raises(ConfigError, match=r"rank 21.*Lower r"):
        made(name, rank=21)


def test_lora_ga_needs_twice_the_rank():
    made("lora_ga", rank=6)
    with pytest.raises(ConfigError, match=r"twice.*so at most 6"):
        made("lora_ga", rank=7)


def test_an_odd_rank_has_no_halves():
    with pytest.raises(ConfigError, match="set r to 4"):
        made("orthogonal", rank=3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", READS)
def test_a_weight_that_is_not_finite(name, bad):
    W = matrix(OUT, IN)
    W[3, 5] = bad
    with pytest.raises(ConfigError, match="NaN or infinity in the weight"):
        made(name, W=W)


@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_a_statistic_that_is_not_finite(name):
    stats = stats_for(name)
    stats[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="NaN or infinity in the (covariance|gradient)"):
        made(name, stats=stats)


def test_components_that_are_not_finite():
    components = stats_for("eva")
    components.vectors[0, 0] = float("inf")
    with pytest.raises(ConfigError, match="NaN or infinity in the components"):
        made("eva", stats=components)


@pytest.mark.parametrize("name", READS)
def test_weights_that_are_not_loaded(name):
    with pytest.raises(ConfigError, match="load them"):
        made(name, W=torch.empty(OUT, IN, device="meta"), stats=stats_for(name))


@pytest.mark.parametrize("name", READS)
def test_weights_that_are_still_quantised(name):
    with pytest.raises(ConfigError, match="dequantise"):
        made(name, W=torch.zeros(OUT, IN, dtype=torch.int8))


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_data_driven_methods_say_what_they_miss(name):
    with pytest.raises(ConfigError, match="stats"):
        made(name, stats=None)


@pytest.mark.parametrize(
    ("name", "kind"), [("eva", "Components"), ("corda", "Tensor or CordaParts"), ("lora_ga", "Tensor")]
)
def test_statistics_of_another_method(name, kind):
    for stats in (stats_for("corda" if name == "eva" else "eva"), {"a": 1}):
        with pytest.raises(ConfigError, match=f"takes a? ?{kind} as stats"):
            made(name, stats=stats)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_statistics_of_another_layer(name):
    with pytest.raises(ConfigError, match="measure it on this layer"):
        made(name, stats=stats_for(name, OUT, IN + 1))


def test_statistics_of_zeros():
    with pytest.raises(ConfigError, match="no inputs but zeros"):
        made("corda", stats=torch.zeros(IN, IN))
    with pytest.raises(ConfigError, match="gradient of this layer is zero"):
        made("lora_ga", stats=torch.zeros(OUT, IN))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"eva", "corda", "lora_ga"}))
def test_stats_without_effect_are_refused(name):
    with pytest.raises(ConfigError, match="takes no stats"):
        made(name, stats=matrix(OUT, IN))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"loftq", "eva", "corda", "lora_ga"}))
def test_options_without_effect_are_refused(name):
    with pytest.raises(ConfigError, match="takes no options"):
        made(name, options={"loftq_bits": 4})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loftq", LoftQConfig(loftq_bits=2, loftq_iter=3)),
        ("eva", EvaConfig(whiten=True)),
        ("corda", CordaConfig(corda_method="kpm")),
        ("lora_ga", LoraGAConfig(direction="ArBr", scale="unit")),
    ],
)
def test_options_may_be_a_sub_config_or_a_dict(name, options):
    one = made(name, options=options, generator=seed(0))
    same = made(name, options=dataclasses.asdict(options), generator=seed(0))
    default = made(name, generator=seed(0))
    assert torch.equal(one.A, same.A)
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.A, default.A)


@pytest.mark.parametrize("options", [{"loftq_bit": 4}, {"loftq_bits": 3}, EvaConfig(), 4])
def test_options_that_cannot_be_right(options):
    with pytest.raises(ConfigError):
        made("loftq", options=options)


def test_whitening_needs_singular_values():
    vectors = stats_for("eva").vectors
    with pytest.raises(ConfigError, match="singular values too"):
        made("eva", stats=Components(vectors), options={"whiten": True})
    with pytest.raises(ConfigError, match="no variance"):
        made("eva", stats=Components(vectors, torch.zeros(len(vectors))), options={"whiten": True})

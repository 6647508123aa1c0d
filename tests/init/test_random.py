import math

import peft
import pytest
import torch
from torch import nn

from veneer.init import Weight, initialise

OUT, IN, RANK = 96, 400, 16
ZERO_START = ("kaiming", "gaussian", "embedding_default")
INITS = (*ZERO_START, "kaiming_both", "normal_both")


def made(name, *, seed=0, out=OUT, into=IN, rank=RANK):
    return initialise(name, Weight.of(torch.zeros(out, into)), rank, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", INITS)
def test_shapes_and_dtype(name):
    factors = made(name)
    assert (factors.A.shape, factors.B.shape) == ((RANK, IN), (OUT, RANK))
    assert factors.A.dtype == factors.B.dtype == torch.float32


@pytest.mark.parametrize("name", INITS)
def test_whether_the_update_starts_at_zero(name):
    factors = made(name)
    assert ((factors.B @ factors.A).abs().max() == 0) == (name in ZERO_START)


@pytest.mark.parametrize("name", INITS)
def test_a_generator_decides_every_number(name):
    torch.manual_seed(1)
    one = made(name)
    torch.manual_seed(2)
    same, other = made(name), made(name, seed=1)
    assert torch.equal(one.A, same.A)
    assert torch.equal(one.B, same.B)
    assert not (torch.equal(one.A, other.A) and torch.equal(one.B, other.B))


@pytest.mark.parametrize("name", INITS)
def test_without_a_generator_torch_s_own_decides(name):
    weight = Weight.of(torch.zeros(OUT, IN))
    torch.manual_seed(1)
    one = initialise(name, weight, RANK)
    torch.manual_seed(1)
    same = initialise(name, weight, RANK)
    assert torch.equal(one.A, same.A)
    assert torch.equal(one.B, same.B)


@pytest.mark.parametrize("name", INITS)
def test_a_generator_leaves_torch_s_own_alone(name):
    before = torch.get_rng_state()
    made(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", INITS)
def test_values_are_not_read(name):
    def refuse():
        raise AssertionError("this initialisation has no need of the weight")

    initialise(name, Weight(4, 6, torch.device("cpu"), refuse), 2)


@pytest.mark.parametrize("name", INITS)
def test_factors_are_where_the_weight_is_and_numbers_where_the_generator_is(name):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    factors = initialise(name, Weight.of(torch.zeros(4, 6, device="meta")), 2, generator=generator)
    assert factors.A.device.type == factors.B.device.type == "meta"
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", INITS)
def test_a_seed_gives_the_same_numbers_on_every_device(name):
    there = initialise(
        name, Weight.of(torch.zeros(OUT, IN, device="cuda")), RANK, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(there.A.cpu(), made(name).A)
    assert torch.equal(there.B.cpu(), made(name).B)


@pytest.mark.parametrize(
    ("name", "factor", "bound"),
    [
        ("kaiming", "A", 1 / math.sqrt(IN)),
        ("kaiming_both", "A", 1 / math.sqrt(IN)),
        ("kaiming_both", "B", 1 / math.sqrt(RANK)),
    ],
)
def test_uniform_bounds(name, factor, bound):
    values = getattr(made(name), factor)
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.99 * bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    ("name", "factor", "std"),
    [
        ("gaussian", "A", 1 / RANK),
        ("embedding_default", "B", 1.0),
        ("normal_both", "A", 1.0),
        ("normal_both", "B", 1.0),
    ],
)
def test_normal_deviations(name, factor, std):
    values = getattr(made(name), factor)
    assert values.std() == pytest.approx(std, rel=0.05)
    assert values.mean() == pytest.approx(0, abs=0.1 * std)
    assert values.abs().max() > 2.5 * std


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(IN, OUT)
        self.embedding = nn.Embedding(IN, OUT)


@pytest.mark.parametrize(
    ("init", "linear", "embedding"),
    [
        (True, "kaiming", "embedding_default"),
        (False, "kaiming_both", "normal_both"),
        ("gaussian", "gaussian", "embedding_default"),
    ],
)
def test_distributions_are_those_of_peft(init, linear, embedding):
    torch.manual_seed(0)
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=RANK, target_modules=["linear", "embedding"], init_lora_weights=init), Both()
    )
    pairs = [
        (theirs.linear.lora_A["default"].weight, made(linear).A),
        (theirs.linear.lora_B["default"].weight, made(linear).B),
        (theirs.embedding.lora_embedding_A["default"], made(embedding).A),
        (theirs.embedding.lora_embedding_B["default"], made(embedding).B),
    ]
    for their, our in pairs:
        assert our.shape == their.shape
        assert our.std().item() == pytest.approx(their.std().item(), rel=0.05)
        assert our.abs().max().item() == pytest.approx(their.abs().max().item(), rel=0.3)

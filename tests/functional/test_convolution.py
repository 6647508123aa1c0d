import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from veneer.functional.convolution import Window, convolve, delta_convolution, update_convolution

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def window_of(conv):
    return Window(conv.stride, conv.padding, conv.dilation, conv.padding_mode)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dimensions", list(CONVS))
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("stride", "padding"), [(1, 0), (2, 1), (1, "same"), (2, "valid"), (1, 2)], ids=lambda value: str(value)
)
def test_convolve_is_torchs_layer(dimensions, mode, stride, padding):
    for kernel, dilation in itertools.product((1, 2, 3), (1, 2)):
        conv = CONVS[dimensions](
            4, 6, kernel, stride, padding, dilation=dilation, groups=2, bias=False, padding_mode=mode
        ).double()
        x = random(2, 4, *range(6, 6 + dimensions))
        assert torch.equal(convolve(x, conv.weight, window_of(conv), groups=2), conv(x))
        assert torch.equal(convolve(x[0], conv.weight, window_of(conv), groups=2), conv(x[0]))


@pytest.mark.parametrize("groups", [1, 3])
def test_the_update_is_a_convolution_by_the_delta(groups):
    x, A, B = random(2, 3, 5, 6), random(6, 3, 2, 3, seed=1), random(9, 6 // groups, 1, 1, seed=2)
    window = Window((1, 2), (1, 2), (2, 1), "circular")
    plain = convolve(x, delta_convolution(A, B, 0.7), window)
    assert_close(update_convolution(x, A, B, 0.7, window, groups=groups), plain)


def test_the_delta_of_a_group_is_made_of_its_part_of_the_rank():
    A, B = random(4, 3, 2, seed=1), random(6, 2, 1, seed=2)
    delta = delta_convolution(A, B, 0.7)
    for out in range(6):
        mine = A[:2] if out < 3 else A[2:]
        assert_close(delta[out], 0.7 * (B[out, 0, 0] * mine[0] + B[out, 1, 0] * mine[1]))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_gradients(mode):
    window = Window((2,), (1,), (2,), mode)
    factors = random(4, 3, 2, seed=1), random(6, 2, 1, seed=2)
    assert gradcheck(lambda x, A, B: update_convolution(x, A, B, 0.7, window, groups=2), (random(2, 3, 7), *factors))


def test_pads_are_what_torch_pads():
    for padding, mode in itertools.product([0, (1, 2), "valid", "same"], ["zeros", "circular"]):
        conv = nn.Conv2d(1, 1, (2, 3), padding=padding, dilation=(3, 2), padding_mode=mode)
        assert window_of(conv).pads(conv.kernel_size) == list(conv._reversed_padding_repeated_twice)
    assert window_of(nn.Conv2d(1, 1, 3, padding=1)).pads((3, 3)) == [1, 1, 1, 1]
    assert F.pad(torch.zeros(1, 4, 4), [1, 1, 1, 1]).shape == (1, 6, 6)

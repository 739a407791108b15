"""The U-Nets' small parts against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from imagewright.networks.layers import (
    ConvDown,
    FourierEmbedding,
    Init,
    PositionalEmbedding,
    Resample,
    UpConv,
    fir_kernel,
    group_norm,
    linear,
    one_hot,
)
from imagewright.types import UserError

INIT = Init("xavier_uniform", bias=1.0)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_two_equal_taps_equal_the_filter_they_stand_for(direction):
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    fast = Resample(direction, (1, 1))
    slow = Resample(direction, (1, 1))
    slow.is_box = False
    assert fast.is_box
    torch.testing.assert_close(fast(x), slow(x))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)])
def test_resampling_changes_the_resolution_by_two_and_keeps_constants_inside(taps):
    x = torch.full((1, 2, 24, 24), 3.0)
    up, down = Resample("up", taps)(x), Resample("down", taps)(x)
    assert up.shape == (1, 2, 48, 48)
    assert down.shape == (1, 2, 12, 12)
    border = len(taps) // 2
    for y in (up, down):
        inside = y[..., border:-border, border:-border]
        torch.testing.assert_close(inside, torch.full_like(inside, 3.0))


def test_fir_kernel_is_the_normalised_outer_product():
    kernel = fir_kernel((1, 3, 3, 1))
    assert kernel.shape == (1, 1, 4, 4)
    torch.testing.assert_close(kernel[0, 0] * 64, torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0])] * 2))


@pytest.mark.parametrize("taps", [(1, 2, 1), (1, -1), ()])
def test_filters_that_cannot_halve_are_refused(taps):
    with pytest.raises(UserError, match="resample_filter is"):
        fir_kernel(taps)


def test_pointwise_convolution_commutes_with_copying_pixels():
    layer = UpConv(3, 5, 1, INIT, (1, 1)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
    torch.testing.assert_close(layer(x), F.conv2d(upsampled, layer.weight, layer.bias))


def test_pointwise_convolution_stays_behind_a_filter_with_a_border():
    layer = UpConv(3, 5, 1, INIT, (1, 3, 3, 1)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(layer.resample(x), layer.weight, layer.bias))


def test_conv_down_is_one_strided_convolution_with_the_combined_kernel():
    layer = ConvDown(2, 3, 3, INIT, (1, 3, 3, 1)).double()
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    combined = F.conv_transpose2d(layer.weight.flatten(0, 1)[:, None], layer.resample.kernel.double().flip(2, 3))
    combined = combined.unflatten(0, layer.weight.shape[:2]).squeeze(2)
    torch.testing.assert_close(layer(x), F.conv2d(x, combined, layer.bias, stride=2, padding=2))


def test_positional_embedding_spans_its_frequencies():
    t = torch.tensor([0.0, 2.5])
    endpoint = PositionalEmbedding(6, endpoint=True)(t)
    omega = torch.tensor([1.0, 1e-2, 1e-4])
    torch.testing.assert_close(endpoint[1], torch.cat([(2.5 * omega).cos(), (2.5 * omega).sin()]))
    torch.testing.assert_close(endpoint[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    omega = torch.tensor([1.0, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)])
    torch.testing.assert_close(PositionalEmbedding(6)(t)[1], torch.cat([(2.5 * omega).cos(), (2.5 * omega).sin()]))


def test_fourier_embedding_has_unit_period_in_its_frequencies():
    layer = FourierEmbedding(4)
    layer.freqs.copy_(torch.tensor([1.0, 2.0]))
    got = layer(torch.tensor([0.25]))
    torch.testing.assert_close(got, torch.tensor([[0.0, -1.0, 1.0, 0.0]]), rtol=0, atol=1e-6)
    assert "freqs" in layer.state_dict()


def test_one_hot_has_a_row_of_zeros_for_no_class_and_refuses_others():
    assert one_hot(torch.tensor([2, -1, 0]), 3, torch.float32).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    for wrong in (3, -2):
        with pytest.raises(RuntimeError, match="Class values"):
            one_hot(torch.tensor([wrong]), 3, torch.float32)


@pytest.mark.parametrize(
    ("scheme", "variance"),
    [("xavier_uniform", 2 / (300 + 200)), ("kaiming_uniform", 1 / 300), ("kaiming_normal", 1 / 300)],
)
def test_initial_variance(scheme, variance):
    torch.manual_seed(0)
    layer = linear(300, 200, Init(scheme, weight=0.5, bias=2.0))
    assert layer.weight.var().item() == pytest.approx(variance / 4, rel=0.03)
    assert layer.bias.var().item() == pytest.approx(variance * 4, rel=0.3)
    assert linear(3, 2, Init(scheme)).bias.abs().max() == 0


def test_uniform_initial_weights_are_bounded():
    bound = math.sqrt(6 / 500)
    largest = linear(300, 200, Init("xavier_uniform")).weight.abs().max().item()
    assert 0.99 * bound < largest <= bound


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (128, 32), (192, 32), (144, 24), (6, 1), (14, 2), (2, 1)])
def test_group_norm_has_at_most_32_groups_that_divide_the_channels(channels, groups):
    assert group_norm(channels, eps=1e-5).num_groups == groups

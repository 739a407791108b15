"""Weights and inputs of few bits: the quantizer's closed forms, storage, and that a network stays what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from imagewright.models.description import build, describe
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.networks.quantized import (
    Quantized,
    Stored,
    count_parameters,
    encoded,
    grid,
    is_quantized,
    layers_of,
    networks_of,
    of_channels,
    packed,
    rounded,
    simulate,
    store,
    unpacked,
    width,
)
from imagewright.types import Condition, UserError

BITS = (2, 3, 4, 5, 8)


def small_unet() -> SongUNet:
    torch.manual_seed(0)
    return SongUNet(
        SongUNetConfig(
            img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1
        )
    ).eval()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("bits", BITS)
def test_what_lies_on_the_grid_stays(bits: int) -> None:
    step, offset = torch.tensor(0.37, dtype=torch.float64), -3
    x = (torch.arange(2**bits, dtype=torch.float64) + offset) * step
    torch.testing.assert_close(rounded(x, x.min(), x.max(), bits), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_half_a_step_and_the_offsets_rounding(bits: int) -> None:
    x, low, high = drawn(10_000).clamp(-0.7, 1.9), *torch.tensor([-0.7, 1.9], dtype=torch.float64)
    step = 2.6 / (2**bits - 1)
    shift = abs(round(-0.7 / step) * step + 0.7)  # of the grid against the range
    error = (rounded(x, low, high, bits) - x).abs().max()
    assert error <= max(step / 2, shift) + 1e-9
    assert error > 0.9 * step / 2


def test_outside_of_its_range_it_clips_and_has_no_gradient() -> None:
    x = torch.tensor([-5.0, 0.1, 5.0], requires_grad=True)
    answer = rounded(x, torch.tensor(-1.0), torch.tensor(1.0), 8)
    torch.testing.assert_close(answer[[0, 2]], torch.tensor([-1.0, 1.0]), rtol=0, atol=2 / 255)
    (gradient,) = torch.autograd.grad(answer.sum(), x)
    assert gradient.tolist() == [0.0, 1.0, 0.0]
    x = torch.tensor([-0.9, -0.8, 1.7, 1.8], requires_grad=True)  # the grid is -0.867 .. 1.733, the range is not
    (gradient,) = torch.autograd.grad(rounded(x, torch.tensor(-0.7), torch.tensor(1.9), 2).sum(), x)
    assert gradient.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_halves_are_rounded_before_the_offset_is_taken_off() -> None:
    """To even numbers of steps: 2.5 is 2, the code 2 + 1."""
    assert encoded(torch.tensor([2.5, 3.5]), torch.tensor(1.0), torch.tensor(-1.0), 4).tolist() == [3, 5]


def test_each_output_channel_has_a_grid_of_its_own() -> None:
    weight = drawn(6, 3, 3, 3) * torch.logspace(-6, 3, 6, dtype=torch.float64)[:, None, None, None]
    error = (rounded(weight, *of_channels(weight), 8) - weight).abs().amax((1, 2, 3))
    assert bool((error < 0.01 * weight.abs().amax((1, 2, 3))).all())
    scaled = weight * torch.tensor([2.0, 3, 1, 5, 0.1, 1], dtype=torch.float64)[:, None, None, None]
    codes = [encoded(w, *grid(*of_channels(w), 4), 4) for w in (weight, scaled)]
    assert torch.equal(*codes)  # so that a gain may be folded in


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_channel_of_one_value_keeps_it(value: float) -> None:
    weight = torch.full((1, 4), value, dtype=torch.float64)
    torch.testing.assert_close(rounded(weight, *of_channels(weight), 3), weight)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_into_as_few_bytes_as_hold_them(bits: int) -> None:
    codes = torch.randint(2**bits, (7, 5), generator=torch.Generator().manual_seed(0))
    data = packed(codes, bits)
    assert data.dtype == torch.uint8 and len(data) == -(-35 * width(bits) // 8)
    assert torch.equal(unpacked(data, bits, codes.shape).long(), codes)
    assert width(bits) == {2: 2, 3: 4, 4: 4}.get(bits, 8)


def test_sixteen_bits_answer_as_floats_do() -> None:
    layer, x = nn.Conv2d(3, 5, 3).double(), drawn(2, 3, 8, 8)
    fine = rounded(layer.weight, *of_channels(layer.weight), 16), rounded(x, x.min(), x.max(), 16)
    torch.testing.assert_close(nn.functional.conv2d(fine[1], fine[0], layer.bias), layer(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("told", [Quantized(bits=8), Quantized(bits=3, activation_bits=8, buckets=4)])
def test_stored_it_answers_as_simulated_and_is_described(told: Quantized) -> None:
    network = small_unet()
    before = sum(p.numel() for p in network.parameters())
    model = EDMPrecond(network)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 50.0])
    plain = model(x, sigma).detach()
    simulate(network, told)
    if told.activation_bits:
        network.edges.copy_(torch.tensor([-0.5, 0.0, 0.5]))
        for _, layer in layers_of(network):
            layer.low.copy_(-torch.tensor([1.0, 2.0, 3.0, 4.0]))
            layer.high.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    simulated = model(x, sigma).detach()
    store(network)
    assert isinstance(network, SongUNet) and is_quantized(model) and count_parameters(model) == before
    torch.testing.assert_close(model(x, sigma), simulated, rtol=0, atol=0)
    assert (simulated - plain).abs().max() > 0
    again = build(describe(model)).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x, sigma), simulated, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(again)(x, sigma), simulated, rtol=0, atol=0)


def test_each_image_has_the_range_of_its_own_noise_level() -> None:
    network = small_unet()
    simulate(network, Quantized(bits=8, activation_bits=4, buckets=2))
    network.edges.zero_()
    for _, layer in layers_of(network):
        layer.low.copy_(torch.tensor([-1.0, -8.0]))
        layer.high.copy_(torch.tensor([1.0, 8.0]))
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([-1.0, 1.0])
    together = network(x, label, cond())
    layer = next(iter(layers_of(network)))[1]
    assert [float(end) for end in layer.range_of(torch.zeros(6, 3))] == [-8, 8], "rows that are no images: the hull"
    for ask in (network.embed, lambda *given: network(x, *given)):  # as a whole, and by its parts
        layer.levels.index = None
        ask(torch.tensor([0.0, 0.1]), cond())
        assert layer.levels.index.tolist() == [0, 1], "an edge is of the lower bucket"
    apart = torch.cat([network(x[k : k + 1], label[k : k + 1], cond()) for k in range(2)])
    torch.testing.assert_close(together, apart)
    for _, layer in layers_of(network):
        layer.low[1], layer.high[1] = layer.low[0], layer.high[0]
    narrow = network(x, label, cond())
    assert torch.equal(narrow[0], together[0]) and not torch.equal(narrow[1], together[1])


def cond() -> Condition:
    return Condition()


def test_layers_without_a_range_take_their_inputs_as_they_are() -> None:
    networks = small_unet(), small_unet()
    for network, told in zip(networks, (Quantized(bits=8, activation_bits=8), Quantized(bits=8)), strict=True):
        simulate(network, told)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(*(network(x, torch.zeros(2), cond()) for network in networks))


def test_a_network_within_another_is_part_of_it() -> None:
    outer = small_unet()
    outer.inner = small_unet()
    assert networks_of(nn.ModuleList([outer])) == [outer]


def test_weights_take_the_straight_through_gradient() -> None:
    network = small_unet()
    simulate(network, Quantized(bits=2))
    network(torch.randn(1, 1, 8, 8), torch.zeros(1), cond()).square().sum().backward()
    moved = [layer._parameters["weight"].grad.abs().max() for _, layer in layers_of(network)]
    assert all(float(g) > 0 for g in moved[-3:])


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"bits": 9}, "bits is 9; it must be 2 to 8"),
        ({"bits": 4, "activation_bits": 1}, "activation_bits is 1; it must be 0, or 2 to 8"),
        ({"bits": 4, "buckets": 0}, "buckets is 0; it must be 1 to 1000"),
        ({"bits": 4, "colour": 1}, "no argument 'colour'"),
        ({"bits": "4"}, "bits"),
        (4, '"quantized" is 4; it must be an object'),
    ],
)
def test_a_description_of_no_such_bits_is_refused(told: object, complaint: str) -> None:
    description = {**describe(small_unet()), "quantized": told}
    with pytest.raises(UserError, match=complaint):
        build(description)


def test_what_has_nothing_to_quantize_or_is_quantized_is_refused() -> None:
    network = small_unet()
    simulate(network, Quantized(bits=4))
    store(network)
    assert sum(isinstance(m, Stored) for m in network.modules()) > 10
    with pytest.raises(UserError, match="quantize the one that it was made of"):
        simulate(network, Quantized(bits=4))
